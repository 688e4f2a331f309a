"""Load an adapter from files, in whatever format they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from byway.core.attach import install
from byway.errors import AdapterError, listed
from byway.formats import formats
from byway.formats.classes import recorded_classes
from byway.formats.directory import find_adapter
from byway.formats.format import LoadOptions

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from byway.core.adapter import Adapter
    from byway.core.method import Method

__all__ = ["load"]


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
) -> Adapter:
    """Attach the adapter in the directory `path` to `model` and make it active, in addition to those that are.

    Byway's own files, those of HF peft and those of the adapters library are read.

    Args:
        model: the base that the adapter was trained on; it is not touched unless everything in the files fits.
        path: a directory with an adapter's files.
        name: the adapter's name on this model.
        trainable: if True, its tensors require gradients.
        check_base: refuse a base other than the recorded one (files by other programs record none).
        methods: your own method classes that a file may name; nothing is imported because a file says so.
        tokenizer: compared with the recorded one; a difference becomes a note on the adapter.
        allow_unknown_fields: ignore fields of a newer peft instead of refusing them.

    Raises:
        AdapterError: the files are wrong or do not fit the model; the message names the file and everything found
            wrong.
    """
    directory = find_adapter(Path(path))
    options = LoadOptions(check_base=check_base, methods=tuple(methods), tokenizer=tokenizer, allow_unknown_fields=allow_unknown_fields)
    chosen = next((format for format in formats() if format.reads(directory)), None)
    if chosen is None:
        raise AdapterError(f"{directory} is in no format that Byway reads", "save it again with the program that wrote it")
    loaded = chosen.load(model, directory, options)
    classes = recorded_classes(directory)
    adapter = install(model, loaded.method, name, loaded.plan, notes=tuple(loaded.notes), trainable=trainable)
    if classes is not None and classes.name(model):
        adapter.notes = (*adapter.notes, f"the model's classes are named as in training: {listed(classes.names, 6)}")
    return adapter
