"""Architecture facts: where trunk, layers, attention, feed-forward and head of a model are, and what its modules are called in files.

``facts(model)`` reads a known family from the table (``table.py``), another from its structure; ``checkpoint_names(model)`` translates
module paths into the names that checkpoints use. This package is the only place that knows families.
"""

from __future__ import annotations

from byway.core.families.facts import ROLES, Facts, layer_index, locate
from byway.core.families.fused import Fused
from byway.core.families.names import checkpoint_name, checkpoint_names, module_path
from byway.core.families.reading import facts

__all__ = [
    "ROLES",
    "Facts",
    "Fused",
    "checkpoint_name",
    "checkpoint_names",
    "facts",
    "layer_index",
    "locate",
    "module_path",
]
