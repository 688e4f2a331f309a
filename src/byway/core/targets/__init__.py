"""Select the modules a method acts on from what the user wrote."""

from __future__ import annotations

from byway.core.targets.resolve import ALL_LINEAR, modules_to_save, pattern_value, resolve

__all__ = ["ALL_LINEAR", "modules_to_save", "pattern_value", "resolve"]
