"""Files: adapters that HF peft, vLLM and Byway read (``peft.py``, ``peft_load.py``), those peft has no name for (``native.py``).

``files.py`` is the one writer and reader, ``fingerprint.py`` knows a base again, ``tensors.py`` holds the checks that all formats share.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from byway.formats.directory import CONFIGS, find_adapter

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
    from byway.disk.files import read_json
    from byway.formats.adapterhub import load as adapters_library_load
    from byway.formats.adapterhub import save as adapters_library
    from byway.formats.native import load as native
    from byway.formats.peft import load as peft_load

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
