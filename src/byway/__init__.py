"""Byway: parameter-efficient fine-tuning on frozen models.

A pretrained model is frozen and a small side path is trained next to it::

    import byway
    model, tokenizer = byway.load_base("smollm2-135m-instruct")
    adapter = byway.attach(model, byway.LoRA(rank=8))
    ...                                     # train with your own loop, Lightning, transformers' Trainer, or byway.train(recipe)
    adapter.save("my-adapter")

Names are imported when they are first used, so that ``import byway`` and ``byway --help`` do not wait for torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from byway.base import load_base
    from byway.core import (
        Adapter,
        Method,
        SidePath,
        Site,
        activate,
        adapters,
        attach,
        base_state_dict,
        detach,
        disabled,
        side_paths,
    )
    from byway.errors import AdapterError, BywayError, ConfigError, DataError, NotMergeable, RunError, TargetError
    from byway.formats import load
    from byway.merge import MergeReport, merge
    from byway.merge_files import merge_files
    from byway.methods.lora import LoRA
    from byway.recipe import Recipe
    from byway.train import Run, train

__version__ = "0.1.0"

_HOME = {
    "byway.base": ("load_base",),
    "byway.core": (
        "Adapter", "Method", "SidePath", "Site", "activate", "adapters", "attach", "base_state_dict", "detach", "disabled", "side_paths",
    ),
    "byway.errors": ("AdapterError", "BywayError", "ConfigError", "DataError", "NotMergeable", "RunError", "TargetError"),
    "byway.formats": ("load",),
    "byway.merge": ("MergeReport", "merge"),
    "byway.merge_files": ("merge_files",),
    "byway.methods.lora": ("LoRA",),
    "byway.recipe": ("Recipe",),
    "byway.train": ("Run", "train"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [  # noqa: RUF022 - in the order a reader meets them
    "load_base", "attach", "detach", "side_paths", "activate", "disabled", "adapters", "base_state_dict", "load", "merge", "merge_files",
    "train", "Recipe", "Run", "LoRA", "Site", "SidePath", "Method", "Adapter", "MergeReport",
    "BywayError", "ConfigError", "TargetError", "AdapterError", "DataError", "NotMergeable", "RunError",
]  # fmt: skip


class _Package(ModuleType):
    """This package: ``byway.train`` and ``byway.merge`` stay the contract's functions also after modules of those names are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        from byway.errors import nearest

        raise AttributeError(f"module 'byway' has no attribute {name!r} {nearest(name, __all__)}".rstrip())
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # next time without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
