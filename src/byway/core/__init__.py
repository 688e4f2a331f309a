"""The names that users and authors of methods need, from the files of this package.

Inside the package each file imports from the file that defines a name. Names are imported when they are first used:
``core.fields`` is needed to read a recipe, which must not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from byway.core.adapter import Adapter, adapters
    from byway.core.attach import activate, attach, detach, disabled
    from byway.core.method import BuildContext, Frozen, Method, Placement
    from byway.core.peft_format import PeftFormat
    from byway.core.slots import ModuleRef, SidePath, Site, base_modules, base_state_dict, penalties, side_paths
    from byway.core.targets import resolve
    from byway.core.weights import dense, device_of, features, is_linear, is_transposed, store

_HOME = {
    "adapter": ("Adapter", "adapters"),
    "attach": ("activate", "attach", "detach", "disabled"),
    "method": ("BuildContext", "Frozen", "Method", "Placement"),
    "peft_format": ("PeftFormat",),
    "slots": ("ModuleRef", "SidePath", "Site", "base_modules", "base_state_dict", "penalties", "side_paths"),
    "targets": ("resolve",),
    "weights": ("dense", "device_of", "features", "is_linear", "is_transposed", "store"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Adapter",
    "BuildContext",
    "Frozen",
    "Method",
    "ModuleRef",
    "PeftFormat",
    "Placement",
    "SidePath",
    "Site",
    "activate",
    "adapters",
    "attach",
    "base_modules",
    "base_state_dict",
    "dense",
    "detach",
    "device_of",
    "disabled",
    "features",
    "is_linear",
    "is_transposed",
    "penalties",
    "resolve",
    "side_paths",
    "store",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'byway.core' has no attribute {name!r}")
    return getattr(importlib.import_module(f"byway.core.{_MODULE_OF[name]}"), name)
