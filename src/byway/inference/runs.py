"""Recognize the directory that a command is given (a run, a checkpoint in one, or an adapter) and load its model.

::

    run/   adapter/ (one adapter)  or  adapter/<name>/ (several)    recipe.yaml    checkpoints/step-N/
    adapter/   adapter_config.json (HF peft's and ours) or byway_adapter.json (methods that HF peft does not have)

:func:`find` reads names, small JSON files and headers only; the model is loaded by :meth:`Found.load`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byway.base import load_base
from byway.base.architecture import HEAD_NAMES
from byway.base.heads import HEADS, of_peft_type
from byway.base.source import on_this_disk
from byway.base.tokenizer import stored_tokenizer
from byway.core.disk.files import read_safetensors, read_safetensors_header
from byway.data.template import set_template
from byway.errors import ConfigError, listed, nearest
from byway.formats import format_of
from byway.formats.classes import recorded_classes
from byway.formats.directory import config_names, holds_adapter
from byway.formats.record import recorded_path
from byway.recipe.names import adapter_names
from byway.recipe.recipe import Recipe
from byway.tasks import load
from byway.train import randomness

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from byway.core.adapter import Adapter

__all__ = ["Found", "adapter_directories", "find"]

RECIPE = "recipe.yaml"
ADAPTER = "adapter"


@dataclass(frozen=True, kw_only=True)
class Found:
    """Adapters on disk, and the base and the run they belong to."""

    path: Path
    """The directory that was asked for."""
    adapters: Mapping[str, Path]
    """Adapter name → its directory, in the order of attaching; ``default`` if there is one."""
    base: str
    """A directory, a .gguf file, a hub id or the built-in name; ``""`` if it is not recorded."""
    run: Path | None = None
    recipe: Recipe | None = None
    quantize: str | None = None
    """The quantization of the base in training: ``int8``, ``nf4`` or None."""
    task: str = "auto"
    """The `task` for :func:`byway.load_base`."""
    label_names: tuple[str, ...] | None = None
    num_labels: int | None = None
    allow_import: bool = False
    """True if classes that the files name by import path may be imported."""

    def load_base(self, dtype: torch.dtype | str = "auto", compute: str = "same") -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
        """Load the base without adapters, with the head and quantization they need, and the adapters' tokenizer."""
        if not self.base:
            raise ConfigError(f"{self.path} does not record its base", "set --base to a directory, a .gguf file or a hub id")
        device = None if self.recipe is None or self.recipe.base.device == "auto" else self.recipe.base.device
        labels: dict[str, Any] = {}
        if self.task in HEADS and HEADS[self.task].labels:
            labels = {"label_names": self.label_names} if self.label_names else {"num_labels": self.num_labels}
        added = () if self.recipe is None else self.recipe.base.add_tokens
        options = {"task": self.task, "device_map": device, "compute": compute, "add_tokens": added, **labels}
        with randomness.preserved():
            # a new head is the one that training started from, so that the scores of the bare base are always the same
            randomness.seed(0 if self.recipe is None else self.recipe.train.seed)
            model, tokenizer = load_base(self.base, dtype, self.quantize, **options)
        return model, self._tokenizer(tokenizer)

    def _tokenizer(self, base: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer, with its chat template, that the adapters were trained with."""
        for directory in self.adapters.values():
            found = stored_tokenizer(directory, base)
            if found is not None:
                return found
        if base is not None and self.recipe is not None:
            set_template(base, self.recipe.data.template, self.recipe.data.template_variables)
        return base

    def load(self, dtype: torch.dtype | str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, list[Adapter]]:
        """Return (model in evaluation mode with every adapter attached and active, tokenizer or None, adapters).

        `dtype` None: the recipe's, else as the base is stored. The base must be the one the adapters were trained on.
        """
        chosen = dtype or ("auto" if self.recipe is None else self.recipe.base.dtype)
        model, tokenizer = self.load_base(chosen, "same" if self.recipe is None else self.recipe.base.compute)
        return model, tokenizer, self.attach(model, tokenizer)

    def attach(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> list[Adapter]:
        """Attach the adapters to `model`, strictly; if `tokenizer` is not the recorded one, the adapter gets a note."""
        from byway.formats.load import load

        methods = () if self.recipe is None else tuple(type(method) for method in self.recipe.method)
        options: dict[str, Any] = {"methods": methods, "tokenizer": tokenizer, "allow_import": self.allow_import}
        return [load(model, path, name, **options) for name, path in self.adapters.items()]


def find(path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, *, allow_import: bool = False) -> Found:
    """Return the adapters in `path`. `base` overrides the base that the run or adapter records.

    `allow_import`: import the classes that the run names by import path, which runs code that its author chose.

    Raises:
        ConfigError: there is no such directory, or it is neither a run nor an adapter (the message says what it
            contains); the run names a class by import path, and `allow_import` is False; or its base is not where it
            was.
    """
    adapters = adapter_directories(path)
    given = Path(path)
    run = _run_of(given)
    recipe = None if run is None else Recipe.load(run / RECIPE, allow_import=allow_import)
    if recipe is not None:
        adapters = {name: adapters[name] for name in adapter_names(recipe.method) if name in adapters} | adapters
    found = _complete(given, adapters, run, recipe, allow_import)
    return replace(found, base=_present(found)) if base is None else replace(found, base=os.fspath(base))


def adapter_directories(path: str | os.PathLike[str]) -> dict[str, Path]:
    """Return the adapters in a run, a checkpoint in one, or a directory of adapters, by name. No file is opened.

    Raises:
        ConfigError: there is none; the message says what the directory contains.
    """
    given = Path(path)
    if not given.exists():
        siblings = [entry.name for entry in given.parent.iterdir()] if given.parent.is_dir() else []
        raise ConfigError(f"{os.fspath(path)!r} does not exist", nearest(given.name, siblings))
    if not given.is_dir():
        raise ConfigError(f"{os.fspath(path)!r} is a file", f"use the directory it is in: {str(given.parent)!r}")
    folder = given / ADAPTER if (given / ADAPTER).is_dir() and not holds_adapter(given) else given
    if holds_adapter(folder):
        return {"default": folder}
    adapters = {entry.name: entry for entry in sorted(folder.iterdir()) if entry.is_dir() and holds_adapter(entry)}
    if adapters:
        return adapters
    names = sorted(entry.name for entry in given.iterdir())
    there = f"it contains: {listed(names, 10)}" if names else "it is empty"
    if (given / "config.json").is_file():
        raise ConfigError(f"{given} is a model, not a run or an adapter ({there})", "use the directory of a run or an adapter")
    if _run_of(given) is not None and not (given / ADAPTER).is_dir():
        raise ConfigError(
            f"{given} is a run without an adapter: no {ADAPTER}/ ({there})",
            "the run has not finished; continue it with byway train --resume",
        )
    raise ConfigError(
        f"{given} is neither a run (no {ADAPTER}/) nor an adapter (no {listed(config_names())}); {there}",
        "use the output directory of byway train, or a directory with an adapter_config.json",
    )


def _run_of(given: Path) -> Path | None:
    """Return the directory of the run that `given` is, or is in; None if there is none.

    An adapter belongs to a run as ``run/adapter``, ``run/adapter/<name>`` or ``run/checkpoints/step-N/adapter``.
    """
    above = given.resolve().parents
    places = (given, *above[:2])
    if holds_adapter(given):
        places = above[:4] if ADAPTER in (given.resolve().name, given.resolve().parent.name) else ()
    return next((place for place in places if (place / RECIPE).is_file()), None)


def _present(found: Found) -> str:
    """Return where the base of `found` is: the recorded path, if its name is relative to another directory.

    Whether what is there is still the same base is checked when the adapters are attached.

    Raises:
        ConfigError: it was a directory or a file, and is not there.
    """
    recorded = recorded_path(next(iter(found.adapters.values())))
    name = os.path.expanduser(found.base)
    if recorded is None or not name or os.path.isabs(name):
        return found.base
    here, there = on_this_disk(name), on_this_disk(recorded)
    if here and (not there or os.path.realpath(name) == os.path.realpath(recorded)):
        return found.base
    if there:
        return recorded
    raise ConfigError(
        f"{found.path} was trained on the base {found.base!r}, a path relative to the directory that training ran in; "
        f"it is neither here nor where it was then ({recorded!r})",
        "name its directory with --base",
    )


def _complete(given: Path, adapters: dict[str, Path], run: Path | None, recipe: Recipe | None, allow_import: bool) -> Found:
    if recipe is not None:
        base, quantize, names = recipe.base.model, recipe.base.quantize, recipe.data.labels
        head = HEADS.get(load(recipe.data.task).head)
    else:
        first = next(iter(adapters.values()))
        config = format_of(first).read_config(first)
        base, quantize, names = str(config.get("base_model_name_or_path") or ""), _quantized(adapters.values()), None
        head = of_peft_type(config.get("task_type"))
        if head is not None and head.labels:
            recorded = recorded_classes(first)
            names = None if recorded is None else recorded.names
    number = _head_rows(adapters.values()) if head is not None and head.labels and not names else None
    return Found(
        path=given,
        adapters=adapters,
        base=base,
        run=run,
        recipe=recipe,
        quantize=quantize,
        task="auto" if head is None else head.name,
        label_names=names,
        num_labels=number,
        allow_import=allow_import,
    )


def _head_rows(adapters: Iterable[Path]) -> int | None:
    """Return the number of classes of the saved head: the rows of its last matrix."""
    for adapter in adapters:
        for file in sorted(adapter.glob("*.safetensors")):
            for name, shape in read_safetensors_header(file)[0].items():
                parts = name.split(".")
                if len(shape) == 2 and parts[-1] == "weight" and set(parts) & set(HEAD_NAMES) and "dense" not in parts:
                    return shape[0]
    return None


def _quantized(adapters: Iterable[Path]) -> str | None:
    """Return the quantization of the base's linear maps, from the fingerprint in the adapter's files."""
    from byway.formats.record import read_record

    for adapter in adapters:
        file = next(iter(sorted(adapter.glob("*.safetensors"))), None)
        if file is None:
            continue
        tensors, metadata = read_safetensors(file)
        recorded = read_record(metadata, tensors, file)
        kinds = {matrix.kind for matrix in recorded.matrices.values()} if recorded is not None else set()
        for kind, quantizer in (("4bit", "nf4"), ("int8", "int8")):
            if kind in kinds:
                return quantizer
    return None
