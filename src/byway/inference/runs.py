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
from byway.core.disk.files import read_json, read_safetensors
from byway.errors import ConfigError, listed, nearest
from byway.formats.classes import recorded_classes
from byway.formats.directory import config_names, holds_adapter
from byway.recipe.names import adapter_names
from byway.recipe.recipe import Recipe
from byway.tasks import load
from byway.train import randomness

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from byway.core.adapter import Adapter

__all__ = ["Found", "find"]

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

    def load_base(self, dtype: torch.dtype | str = "auto", compute: str = "same") -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
        """Load the base without adapters, with the head and quantization that they need."""
        if not self.base:
            raise ConfigError(f"{self.path} does not record its base", "set --base to a directory, a .gguf file or a hub id")
        device = None if self.recipe is None or self.recipe.base.device == "auto" else self.recipe.base.device
        labels: dict[str, Any] = {}
        if self.task in HEADS and HEADS[self.task].labels:
            labels = {"label_names": self.label_names} if self.label_names else {"num_labels": self.num_labels}
        with randomness.preserved():
            # a new head is the one that training started from, so that the scores of the bare base are always the same
            randomness.seed(0 if self.recipe is None else self.recipe.train.seed)
            return load_base(self.base, dtype, self.quantize, task=self.task, device_map=device, compute=compute, **labels)

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

        # a user's own method is named in the run's recipe, which has imported it
        methods = () if self.recipe is None else tuple(type(method) for method in self.recipe.method)
        return [load(model, path, name, methods=methods, tokenizer=tokenizer) for name, path in self.adapters.items()]


def find(path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> Found:
    """Return the adapters in `path`. `base` overrides the base that the run or adapter records.

    Raises:
        ConfigError: there is no such directory, or it is neither a run nor an adapter; the message says what it
            contains.
    """
    given = Path(path)
    if not given.exists():
        siblings = [entry.name for entry in given.parent.iterdir()] if given.parent.is_dir() else []
        raise ConfigError(f"{os.fspath(path)!r} does not exist", nearest(given.name, siblings))
    if not given.is_dir():
        raise ConfigError(f"{os.fspath(path)!r} is a file", f"use the directory it is in: {str(given.parent)!r}")
    found = _of_adapter(given) if holds_adapter(given) else _of_run(given)
    return found if base is None else replace(found, base=os.fspath(base))


def _of_run(given: Path) -> Found:
    """Find the adapters of a run, a checkpoint in one (``checkpoints/step-N``), or a directory of several adapters."""
    folder = given / ADAPTER if (given / ADAPTER).is_dir() else given
    if folder != given and holds_adapter(folder):
        adapters = {"default": folder}
    else:
        adapters = {entry.name: entry for entry in sorted(folder.iterdir()) if entry.is_dir() and holds_adapter(entry)}
    above = given.resolve().parents
    run = next((place for place in (given, *above[:2]) if (place / RECIPE).is_file()), given)
    recipe = _recipe(run)
    if not adapters:
        names = sorted(entry.name for entry in given.iterdir())
        there = f"it contains: {listed(names, 10)}" if names else "it is empty"
        if (given / "config.json").is_file():
            raise ConfigError(f"{given} is a model, not a run or an adapter ({there})", "use the directory of a run or an adapter")
        if recipe is not None and not (given / ADAPTER).is_dir():
            raise ConfigError(
                f"{given} is a run without an adapter: no {ADAPTER}/ ({there})",
                "the run has not finished; continue it with byway train --resume",
            )
        raise ConfigError(
            f"{given} is neither a run (no {ADAPTER}/) nor an adapter (no {listed(config_names())}); {there}",
            "use the output directory of byway train, or a directory with an adapter_config.json",
        )
    if recipe is not None:
        adapters = {name: adapters[name] for name in adapter_names(recipe.method) if name in adapters} | adapters
    return _complete(given, adapters, run if recipe is not None else None, recipe)


def _of_adapter(given: Path) -> Found:
    """Find the run of ``run/adapter``, ``run/adapter/<name>`` or ``run/checkpoints/step-N/adapter``, by its recipe."""
    above = given.resolve().parents
    inside = ADAPTER in (given.resolve().name, given.resolve().parent.name)
    run = next((place for place in above[:4] if (place / RECIPE).is_file()), None) if inside else None
    return _complete(given, {"default": given}, run, None if run is None else _recipe(run))


def _complete(given: Path, adapters: dict[str, Path], run: Path | None, recipe: Recipe | None) -> Found:
    if recipe is not None:
        base, quantize, names = recipe.base.model, recipe.base.quantize, recipe.data.labels
        head = HEADS.get(load(recipe.data.task).head)
    else:
        first = next(iter(adapters.values()))
        config = read_json(next(first / name for name in config_names() if (first / name).is_file()))
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
    )


def _recipe(run: Path) -> Recipe | None:
    return Recipe.load(run / RECIPE) if (run / RECIPE).is_file() else None


def _head_rows(adapters: Iterable[Path]) -> int | None:
    """Return the number of classes of the saved head: the rows of its last matrix."""
    from safetensors import safe_open

    for adapter in adapters:
        for file in sorted(adapter.glob("*.safetensors")):
            with safe_open(file, framework="pt") as stream:
                for name in stream.keys():  # noqa: SIM118 - a safetensors handle, not a dict
                    parts = name.split(".")
                    shape = stream.get_slice(name).get_shape()
                    if len(shape) == 2 and parts[-1] == "weight" and set(parts) & set(HEAD_NAMES) and "dense" not in parts:
                        return int(shape[0])
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
