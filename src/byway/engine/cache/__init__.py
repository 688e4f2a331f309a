"""The frozen-trunk cache: states of each document are computed once and looked up in later epochs and runs.

Read in this order: ``shortcut.py`` (which modules are not run, and how the user's model continues from cached states),
``survey.py`` (what these states depend on), ``units.py`` (documents in units and in batches), ``store.py`` (one store),
``root.py`` (the directory of all stores), ``trunk.py`` (all of it together, also for a training loop of your own).
"""

from __future__ import annotations

from byway.engine.cache.shortcut import Shortcut, shortcuts
from byway.engine.cache.store import Kept
from byway.engine.cache.trunk import LIMIT_GB, TrunkCache

__all__ = ["LIMIT_GB", "Kept", "Shortcut", "TrunkCache", "shortcuts"]
