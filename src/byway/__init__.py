"""Byway: parameter-efficient fine-tuning on frozen models.

Freeze a pretrained model and train a small side path next to it::

    import byway
    model, tokenizer = byway.load_base("smollm2-135m-instruct")
    adapter = byway.attach(model, byway.LoRA(rank=8))
    ...                                     # your own training loop, a Trainer's, or byway.train(recipe)
    adapter.save("my-adapter")

Names are imported on first use, so that ``import byway`` and ``byway --help`` do not import torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from byway.base.load import load_base
    from byway.core.adapter import Adapter, adapters
    from byway.core.attach import activate, attach, detach, disabled
    from byway.core.merge import MergeReport, merge
    from byway.core.method import Method
    from byway.core.slots import SidePath, Site, base_state_dict, side_paths
    from byway.errors import AdapterError, BywayError, ConfigError, DataError, NotMergeable, RunError, TargetError
    from byway.formats.load import load
    from byway.formats.loralib import load_loralib
    from byway.methods.adalora import AdaLoRA
    from byway.methods.bitfit import BitFit
    from byway.methods.bottleneck_adapter import BottleneckAdapter
    from byway.methods.dora import DoRA
    from byway.methods.full import Full
    from byway.methods.ia3 import IA3
    from byway.methods.ladder_side_tuning import LadderSideTuning
    from byway.methods.layer_norm import LayerNormTuning
    from byway.methods.lora import LoRA
    from byway.methods.p_tuning import PTuning
    from byway.methods.p_tuning_v2 import PTuningV2
    from byway.methods.parallel_adapter import ParallelAdapter
    from byway.methods.prefix_tuning import PrefixTuning
    from byway.methods.prompt_tuning import PromptTuning
    from byway.methods.weight_chain import WeightChain
    from byway.recipe.recipe import Recipe
    from byway.train.loop import Run, train
    from byway.workshop.merge.files import merge_files

__version__ = "0.1.0"

_HOME = {
    "byway.base.load": ("load_base",),
    "byway.core.adapter": ("Adapter", "adapters"),
    "byway.core.attach": ("activate", "attach", "detach", "disabled"),
    "byway.core.merge": ("MergeReport", "merge"),
    "byway.core.method": ("Method",),
    "byway.core.slots": ("SidePath", "Site", "base_state_dict", "side_paths"),
    "byway.errors": ("AdapterError", "BywayError", "ConfigError", "DataError", "NotMergeable", "RunError", "TargetError"),
    "byway.formats.load": ("load",),
    "byway.formats.loralib": ("load_loralib",),
    "byway.methods.adalora": ("AdaLoRA",),
    "byway.methods.bitfit": ("BitFit",),
    "byway.methods.bottleneck_adapter": ("BottleneckAdapter",),
    "byway.methods.dora": ("DoRA",),
    "byway.methods.full": ("Full",),
    "byway.methods.ia3": ("IA3",),
    "byway.methods.ladder_side_tuning": ("LadderSideTuning",),
    "byway.methods.layer_norm": ("LayerNormTuning",),
    "byway.methods.lora": ("LoRA",),
    "byway.methods.p_tuning": ("PTuning",),
    "byway.methods.p_tuning_v2": ("PTuningV2",),
    "byway.methods.parallel_adapter": ("ParallelAdapter",),
    "byway.methods.prefix_tuning": ("PrefixTuning",),
    "byway.methods.prompt_tuning": ("PromptTuning",),
    "byway.methods.weight_chain": ("WeightChain",),
    "byway.recipe.recipe": ("Recipe",),
    "byway.train.loop": ("Run", "train"),
    "byway.workshop.merge.files": ("merge_files",),
}  # fmt: skip
"""Module → its public names. Repeats the imports above, which only type checkers see; a test compares the two."""
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [  # noqa: RUF022 - in the order of use
    "load_base", "attach", "detach", "side_paths", "activate", "disabled", "adapters", "base_state_dict", "load", "load_loralib", "merge",
    "merge_files", "train", "Recipe", "Run",
    "LoRA", "DoRA", "AdaLoRA", "WeightChain", "PromptTuning", "PTuning", "PrefixTuning", "PTuningV2", "BottleneckAdapter",
    "ParallelAdapter", "LadderSideTuning", "IA3", "BitFit", "LayerNormTuning", "Full",
    "Site", "SidePath", "Method", "Adapter", "MergeReport",
    "BywayError", "ConfigError", "TargetError", "AdapterError", "DataError", "NotMergeable", "RunError",
]  # fmt: skip


class _Package(ModuleType):
    """This package. Importing a submodule such as ``byway.train`` must not replace the function of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        from byway.errors import nearest

        if name[:1].isupper():  # a method that was added to the folder needs no entry above
            methods = importlib.import_module("byway.methods")
            found = next((cls for own in methods.names() if (cls := methods.load(own)).__name__ == name), None)
            if found is not None:
                return found
        raise AttributeError(f"module 'byway' has no attribute {name!r} {nearest(name, __all__)}".rstrip())
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
