"""Architecture facts: where a model's trunk, layers, attention, feed-forward parts and head are, and the names of its
modules in files.

``facts(model)`` reads a known family from the table (``table.py``) and any other model from its structure.
``checkpoint_names(model)`` translates module paths to the names in checkpoints. This package is the only place that
knows families.
"""

from __future__ import annotations

from byway.core.families.detect import attention_windows, facts, input_embedding, language_stacks, output_head
from byway.core.families.facts import ROLES, Facts, inside, layer_index, locate
from byway.core.families.fused import Fused
from byway.core.families.names import checkpoint_name, checkpoint_names, module_path

__all__ = [
    "ROLES",
    "Facts",
    "Fused",
    "attention_windows",
    "checkpoint_name",
    "checkpoint_names",
    "facts",
    "input_embedding",
    "inside",
    "language_stacks",
    "layer_index",
    "locate",
    "module_path",
    "output_head",
]
