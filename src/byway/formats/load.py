"""Load an adapter from files, in whatever format they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byway.core.attach import install
from byway.errors import listed
from byway.formats import format_of
from byway.formats.classes import recorded_classes
from byway.formats.directory import find_adapter
from byway.formats.format import Format, LoadOptions

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from byway.core.adapter import Adapter
    from byway.core.method import Method

__all__ = ["describe", "load"]


def load(
    model: nn.Module,
    path: str | Path,
    name: str = "default",
    trainable: bool = False,
    check_base: bool = True,
    methods: Sequence[type[Method]] = (),
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    allow_unknown_fields: bool = False,
    fields: Mapping[str, Any] | None = None,
    allow_import: bool = False,
) -> Adapter:
    """Attach the adapter in the directory `path` to `model` and make it active, in addition to those that are.

    Byway's own files, those of HF peft and those of the adapters library are read.

    Args:
        model: the base that the adapter was trained on; it is not touched unless everything in the files fits.
        path: a directory with an adapter's files.
        name: the adapter's name on this model.
        trainable: if True, its tensors require gradients.
        check_base: refuse a base other than the recorded one (files by other programs record none).
        methods: your own method classes that a file may name.
        tokenizer: compared with the recorded one; a difference becomes a note on the adapter.
        allow_unknown_fields: ignore fields of a newer peft instead of refusing them.
        fields: fields of the method that replace the file's, to train on (``{"dropout": 0.1}``). What a field adds,
            such as rows of new tokens, starts from the base.
        allow_import: import the classes that a file names by import path (methods, links of a weight chain), which runs
            code. Otherwise nothing is imported because a file says so.

    Raises:
        AdapterError: the files are wrong or do not fit the model; the message names the file and everything found
            wrong.
    """
    directory, format = _format_of(path)
    options = LoadOptions(
        check_base=check_base,
        methods=tuple(methods),
        tokenizer=tokenizer,
        allow_unknown_fields=allow_unknown_fields,
        fields=fields or {},
        allow_import=allow_import,
    )
    loaded = format.load(model, directory, options)
    classes = recorded_classes(directory)
    adapter = install(model, loaded.method, name, loaded.plan, notes=tuple(loaded.notes), trainable=trainable)
    if classes is not None and classes.name(model):
        adapter.notes = (*adapter.notes, f"the model's classes are named as in training: {listed(classes.names, 6)}")
    return adapter


def describe(path: str | Path, methods: Sequence[type[Method]] = ()) -> Method:
    """Return the method of the adapter in the directory `path`, from its configuration alone.

    Raises:
        AdapterError: there is no adapter, or its configuration is wrong.
    """
    directory, format = _format_of(path)
    return format.describe(directory, LoadOptions(methods=tuple(methods)))


def _format_of(path: str | Path) -> tuple[Path, Format]:
    directory = find_adapter(Path(path))
    return directory, format_of(directory)
