"""What a directory is that a command was given: a run, a checkpoint inside one, or an adapter; and the model that belongs to it.

::

    run/   adapter/ (one adapter)  or  adapter/<name>/ (several)    recipe.yaml    checkpoints/step-N/
    adapter/   adapter_config.json (HF peft's and ours) or byway_adapter.json (methods peft has no name for)

Finding reads names and small JSON files only; nothing heavy is imported before :meth:`Found.load`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byway.errors import AdapterError, ConfigError, listed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from byway.core.adapter import Adapter
    from byway.recipe.recipe import Recipe

__all__ = ["Found", "find", "is_adapter"]

RECIPE = "recipe.yaml"
ADAPTER = "adapter"
_PEFT_TASKS = {"CAUSAL_LM": "causal_lm", "SEQ_CLS": "classification"}
_RECIPE_TASKS = {"chat": "causal_lm", "text": "causal_lm", "classification": "classification"}


@dataclass(frozen=True, kw_only=True)
class Found:
    """Adapters on the disk, with what they belong to."""

    path: Path
    """What was asked about."""
    adapters: Mapping[str, Path]
    """Adapter name → its directory, in hook order; ``default`` where there is one."""
    base: str
    """A directory, a .gguf file, a hub id or the built-in name; ``""`` where nobody says."""
    run: Path | None = None
    recipe: Recipe | None = None
    quantize: str | None = None
    """How the base was quantized in training: ``int8``, ``nf4`` or None."""
    task: str = "auto"
    """What :func:`byway.load_base` calls it."""
    label_names: tuple[str, ...] | None = None
    num_labels: int | None = None

    @property
    def adapter_dir(self) -> Path:
        """The one adapter's directory; an AdapterError where there are several."""
        if len(self.adapters) != 1:
            raise AdapterError(f"{self.path} holds {len(self.adapters)} adapters: {listed(self.adapters)}", "name one of their directories")
        return next(iter(self.adapters.values()))

    def load_base(self, dtype: torch.dtype | str = "auto", compute: str = "same") -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
        """The bare base, as the adapters need it (task head, quantization)."""
        from byway.base import load_base

        if not self.base:
            raise ConfigError(f"{self.path} does not say which base it was made on", "give --base: a directory, a .gguf file or a hub id")
        device = None if self.recipe is None or self.recipe.base.device == "auto" else self.recipe.base.device
        labels: dict[str, Any] = {}
        if self.task == "classification":
            labels = {"label_names": self.label_names} if self.label_names else {"num_labels": self.num_labels}
        return load_base(self.base, dtype, self.quantize, task=self.task, device_map=device, compute=compute, **labels)

    def load(self, dtype: torch.dtype | str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, list[Adapter]]:
        """(model in eval mode with every adapter attached and active, tokenizer or None, adapters).

        `dtype` None: the recipe's, else as the base is stored. The base must be the one the adapters were made on.
        """
        chosen = dtype or ("auto" if self.recipe is None else self.recipe.base.dtype)
        model, tokenizer = self.load_base(chosen, "same" if self.recipe is None else self.recipe.base.compute)
        return model, tokenizer, self.attach(model, tokenizer)

    def attach(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> list[Adapter]:
        """Load the adapters beside `model`, strictly; another `tokenizer` than the recorded one is a note on the adapter."""
        from byway.formats.load import load

        # a method of one's own is named by the run's recipe, which has imported it
        methods = () if self.recipe is None else tuple(type(method) for method in self.recipe.method)
        return [load(model, path, name, methods=methods, tokenizer=tokenizer) for name, path in self.adapters.items()]


def find(path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> Found:
    """What `path` is. `base` overrides what run or adapter say.

    Raises:
        ConfigError: no such directory, or neither a run nor an adapter; says what is there instead.
    """
    given = Path(path)
    if not given.exists():
        raise ConfigError(f"{os.fspath(path)!r} does not exist", _sibling_hint(given))
    if not given.is_dir():
        raise ConfigError(f"{os.fspath(path)!r} is a file", f"give the directory it is in: {str(given.parent)!r}")
    found = _of_adapter(given) if is_adapter(given) else _of_run(given)
    return found if base is None else replace(found, base=os.fspath(base))


def is_adapter(directory: Path) -> bool:
    """Whether `directory` itself holds an adapter's files."""
    return any((directory / name).is_file() for name in _adapter_files())


def _adapter_files() -> tuple[str, ...]:
    from byway.formats.directory import NATIVE
    from byway.formats.peft.config import CONFIG

    return CONFIG, NATIVE[0]


def _of_run(given: Path) -> Found:
    """A run, a checkpoint inside one (``checkpoints/step-N``), or the folder of several adapters."""
    folder = given / ADAPTER if (given / ADAPTER).is_dir() else given
    if folder != given and is_adapter(folder):
        adapters = {"default": folder}
    else:
        adapters = {entry.name: entry for entry in sorted(folder.iterdir()) if entry.is_dir() and is_adapter(entry)}
    above = given.resolve().parents
    run = next((place for place in (given, *above[:2]) if (place / RECIPE).is_file()), given)
    recipe = _recipe(run)
    if not adapters:
        raise _nothing_there(given, recipe is not None)
    if recipe is not None:
        adapters = _in_hook_order(adapters, recipe)
    return _complete(given, adapters, run if recipe is not None else None, recipe)


def _of_adapter(given: Path) -> Found:
    """An adapter's own directory; where a recipe lies above it (``run/adapter``, ``run/checkpoints/step-N/adapter``), it is of that run."""
    above = given.resolve().parents
    inside = ADAPTER in (given.resolve().name, given.resolve().parent.name)
    run = next((place for place in above[:4] if (place / RECIPE).is_file()), None) if inside else None
    return _complete(given, {"default": given}, run, None if run is None else _recipe(run))


def _in_hook_order(adapters: dict[str, Path], recipe: Recipe) -> dict[str, Path]:
    from byway.recipe.names import adapter_names

    order = adapter_names(recipe.method)
    known = {name: adapters[name] for name in order if name in adapters}
    return known | adapters


def _complete(given: Path, adapters: dict[str, Path], run: Path | None, recipe: Recipe | None) -> Found:
    if recipe is not None:
        task = _RECIPE_TASKS.get(recipe.data.task, "auto")
        names = recipe.data.labels if task == "classification" else None
        number = None if names or task != "classification" else _head_rows(adapters.values())
        return Found(
            path=given, adapters=adapters, base=recipe.base.model, run=run, recipe=recipe, quantize=recipe.base.quantize,
            task=task, label_names=names, num_labels=number,
        )  # fmt: skip
    config = _config(next(iter(adapters.values())))
    task = _PEFT_TASKS.get(config.get("task_type") or "", "auto")
    number = _head_rows(adapters.values()) if task == "classification" else None
    return Found(
        path=given,
        adapters=adapters,
        base=str(config.get("base_model_name_or_path") or ""),
        quantize=_quantized(adapters.values()),
        task=task,
        num_labels=number,
    )


def _recipe(run: Path) -> Recipe | None:
    from byway.recipe.recipe import Recipe

    return Recipe.load(run / RECIPE) if (run / RECIPE).is_file() else None


def _config(adapter: Path) -> dict[str, Any]:
    from byway.disk.files import read_json

    file = next(adapter / name for name in _adapter_files() if (adapter / name).is_file())
    return read_json(file)


def _head_rows(adapters: Any) -> int | None:
    """How many classes the saved task head has: the rows of its last matrix."""
    from safetensors import safe_open

    from byway.base.architecture import HEAD_NAMES

    for adapter in adapters:
        for file in sorted(adapter.glob("*.safetensors")):
            with safe_open(file, framework="pt") as stream:
                for name in stream.keys():  # noqa: SIM118 - a safetensors handle, not a dict
                    parts = name.split(".")
                    shape = stream.get_slice(name).get_shape()
                    if len(shape) == 2 and parts[-1] == "weight" and set(parts) & set(HEAD_NAMES) and "dense" not in parts:
                        return int(shape[0])
    return None


def _quantized(adapters: Any) -> str | None:
    """What the fingerprint in the adapter's files says about the base's linear maps."""
    from byway.disk.files import read_safetensors
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


def _nothing_there(given: Path, has_recipe: bool) -> ConfigError:
    names = sorted(entry.name for entry in given.iterdir())
    there = f"it holds: {listed(names, 10)}" if names else "it is empty"
    if (given / "config.json").is_file():
        return ConfigError(f"{given} is a model, not a run or an adapter ({there})", "give the run's or the adapter's directory")
    if has_recipe and not (given / ADAPTER).is_dir():
        return ConfigError(
            f"{given} is a run without an adapter: no {ADAPTER}/ ({there})",
            "the run did not finish; byway train --resume continues it",
        )
    return ConfigError(
        f"{given} is neither a run (no {ADAPTER}/) nor an adapter (no {listed(_adapter_files())}); {there}",
        "give the directory that byway train wrote, or one that holds an adapter_config.json",
    )


def _sibling_hint(path: Path) -> str:
    from byway.errors import nearest

    parent: Sequence[str] = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return nearest(path.name, parent)
