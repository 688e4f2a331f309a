"""Files: adapters that HF peft, vLLM and Byway read (``peft.py``, ``peft_load.py``), those peft has no name for (``native.py``).

``files.py`` is the one writer and reader, ``fingerprint.py`` knows a base again, ``tensors.py`` holds the checks that all formats share.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from byway.errors import AdapterError, listed, nearest

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from byway.core import Adapter, Method

__all__ = ["CONFIGS", "find_adapter", "load", "save_adapter"]

CONFIGS = ("adapter_config.json", "byway_adapter.json")
"""The file by which an adapter's directory is known: peft's, or Byway's own for methods that peft has no name for."""


def save_adapter(adapter: Adapter, directory: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """Write `adapter` into `directory` itself: in peft's format where that can hold it, else in Byway's own.

    `tokenizer`: recorded (as hashes, with its chat template) so that loading with another one is noticed.

    Raises:
        AdapterError: `directory` holds something other than an adapter, a tensor is not finite, or the adapter was merged or detached.
        RunError: the disk refused. In both cases what was there is unchanged.
    """
    from byway.core import adapters
    from byway.formats import adapters_library, native, peft

    if adapters(adapter.model).get(adapter.name) is not adapter:  # its tensors are gone, or those of another one of that name
        raise AdapterError(
            f"adapter {adapter.name!r} no longer hangs on the model: it was merged or detached, and nothing is left to save",
            "save it before byway.merge or byway.detach",
        )

    own = adapter.method.peft_type is None or adapter.method.declines_peft(adapter.model)
    write = native.save_adapter if own else peft.save_adapter
    if own and not adapters_library.declined(adapter):
        write = adapters_library.save_adapter
    return write(adapter, Path(directory), tokenizer)


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
    """Attach the adapter in the directory `path` (ours or peft's) to `model` and make it active beside those that are.

    Args:
        model: the base that the adapter was trained on; it is not touched unless everything in the files fits.
        path: a directory with an adapter's files.
        name: the adapter's name on this model.
        trainable: whether its tensors require gradients.
        check_base: refuse a base that is not the recorded one (files by other programs record none).
        methods: method classes of one's own that a file may name; nothing is imported because a file says so.
        tokenizer: compared with the recorded one; a difference is a note on the adapter.
        allow_unknown_fields: ignore fields of a newer peft instead of refusing them.

    Raises:
        AdapterError: with the file and everything found wrong.
    """
    from byway.formats import adapters_library, adapters_library_load, native, peft_load
    from byway.formats.files import read_json

    directory = find_adapter(Path(path))
    if (directory / CONFIGS[0]).exists():
        if adapters_library.is_config(read_json(directory / CONFIGS[0])):
            return adapters_library_load.load_adapter(
                model,
                directory,
                name,
                trainable=trainable,
                check=check_base,
                tokenizer=tokenizer,
                allow_unknown_fields=allow_unknown_fields,
            )
        return peft_load.load_adapter(
            model,
            directory,
            name,
            trainable=trainable,
            check=check_base,
            methods=methods,
            tokenizer=tokenizer,
            allow_unknown_fields=allow_unknown_fields,
        )
    return native.load_adapter(model, directory, name, trainable=trainable, check=check_base, methods=methods, tokenizer=tokenizer)


def find_adapter(path: Path) -> Path:
    """`path`, if an adapter's configuration lies in it; otherwise an AdapterError that says what is there instead."""
    if not path.exists():
        raise AdapterError(f"there is no adapter at {path}: no such directory", _neighbours(path))
    if not path.is_dir():
        raise AdapterError(
            f"{path} is a file; an adapter is a directory with {CONFIGS[0]}", "unpack an archive first; of a single file pass its directory"
        )
    if any((path / config).is_file() for config in CONFIGS):
        return path
    below = sorted(str(entry.parent) for config in CONFIGS for entry in path.glob(f"*/{config}"))
    if below:
        raise AdapterError(f"{path} holds no adapter itself, but there are some below it: {listed(below)}", "pass one of these")
    content = listed((entry.name for entry in path.iterdir()), 10) or "nothing"
    raise AdapterError(f"{path} holds no {CONFIGS[0]}; it holds: {content}")


def _neighbours(path: Path) -> str:
    there = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    adapters = [name for name in there if any((path.parent / name / config).is_file() for config in CONFIGS)]
    return nearest(path.name, there) or (f"adapters in {path.parent}: {listed(adapters, 10)}" if adapters else "")
