"""The frozen-trunk cache: what never changes is computed once, kept for each document, and looked up in later epochs and runs.

Read in this order: ``shortcut.py`` (which modules are not run, and how the user's own model goes on from cached states), ``survey.py``
(what those states depend on), ``units.py`` and ``layout.py`` (documents in files and in batches), ``codec.py``, ``store.py`` and
``place.py`` (on the disk), ``trunk.py`` (all of it together, also for a loop of one's own).
"""

from __future__ import annotations

from byway.engine.cache.codec import Kept
from byway.engine.cache.shortcut import Shortcut, shortcuts
from byway.engine.cache.trunk import LIMIT_GB, TrunkCache

__all__ = ["LIMIT_GB", "Kept", "Shortcut", "TrunkCache", "shortcuts"]
