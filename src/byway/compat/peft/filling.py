"""Copying an adapter's tensors into side paths that are already there."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from byway.core.adapter import Adapter
from byway.disk.files import read_safetensors
from byway.formats.directory import WEIGHTS
from byway.formats.peft.save import key_of
from byway.formats.record import check_tensors, fill

__all__ = ["fill_exactly", "places"]


def places(adapter: Adapter) -> dict[str, Tensor]:
    """peft's key in a file → the adapter's own tensor; frozen factors that a start subtracts are not among them."""
    found: dict[str, Tensor] = {}
    for site, side in adapter.side_paths():
        own = dict(side.named_parameters()) | dict(side.named_buffers())
        if side.peft_names:
            found |= {key_of(site.path, theirs): own[ours].detach() for ours, theirs in side.peft_names.items() if ours in own}
        else:
            found |= {key_of(site.path, name): tensor for name, tensor in side.export().items()}
    return found


@torch.no_grad()
def fill_exactly(adapter: Adapter, directory: Path) -> None:
    """Fill the adapter from the file in `directory`; every tensor must land and every expected one be there."""
    tensors, _ = read_safetensors(directory / WEIGHTS)
    expected = places(adapter)
    check_tensors(expected, tensors, directory / WEIGHTS)
    fill(expected, tensors)
