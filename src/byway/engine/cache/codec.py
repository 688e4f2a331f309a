"""How states are kept: exactly, or as an approximation that was asked for.

``same``: in the dtype they were computed in. ``bf16``: rounded to bfloat16. ``int8``: h ≈ q · r · c with whole numbers q in [−127, 127], a
factor r for each token and one c for each channel of a unit: a few channels of a transformer's states, and all of its first token's, are a
hundred times larger than the rest, and a factor of one kind alone would leave the others with two or three bits.

Legend: n tokens, d width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Kept", "bytes_per_row", "decode", "encode", "parts"]

Kept = Literal["same", "bf16", "int8"]

_ROW, _CHANNEL = ".row", ".channel"


def encode(name: str, states: Tensor, kept: Kept) -> dict[str, Tensor]:
    """The tensors that stand for `states` (n, d) in a file, by name."""
    if kept == "same":
        return {name: states}
    if kept == "bf16":
        return {name: states.to(torch.bfloat16)}
    wide = states.float()
    channel = wide.abs().median(dim=0).values.clamp_min(1e-12)  # (d,)
    scaled = wide / channel
    row = scaled.abs().amax(dim=1).clamp_min(1e-30) / 127  # (n,)
    whole = (scaled / row[:, None]).round().to(torch.int8)
    return {name: whole, name + _ROW: row, name + _CHANNEL: channel}


def decode(name: str, tensors: Mapping[str, Tensor], first: int, last: int, kept: Kept, dtype: torch.dtype) -> Tensor:
    """Rows `first` to `last` (excluded) of what :func:`encode` was given, in `dtype`; a view where nothing has to be computed."""
    own = tensors[name][first:last]
    if kept != "int8":
        return own if own.dtype == dtype else own.to(dtype)
    return (own.float() * tensors[name + _ROW][first:last, None] * tensors[name + _CHANNEL]).to(dtype)


def parts(name: str, rows: int, width: int, dtype: torch.dtype, kept: Kept) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name → dtype and shape of what :func:`encode` gives."""
    if kept == "int8":
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {name: (torch.int8, (rows, width))}
        return shapes | {name + _ROW: (torch.float32, (rows,)), name + _CHANNEL: (torch.float32, (width,))}
    return {name: (dtype if kept == "same" else torch.bfloat16, (rows, width))}


def bytes_per_row(width: int, dtype: torch.dtype, kept: Kept) -> int:
    """Bytes on the disk for one token's states."""
    return width + 4 if kept == "int8" else width * (dtype if kept == "same" else torch.bfloat16).itemsize
