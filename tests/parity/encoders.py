"""The encoders of virtual tokens and prefixes, written a second time with torch's own modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byway.core.adapter import Adapter
from byway.methods.prefix.sides import Prefix
from byway.methods.virtual.sides import VirtualTokens

Pairs = list[tuple[Tensor, Tensor]]


class Encoder:
    """A function that returns (P, ·) from leaf tensors. `pairs`: (our tensor, its leaf)."""

    def __init__(self, pairs: Pairs, vectors: Callable[[], Tensor]) -> None:
        self.pairs, self.vectors = pairs, vectors


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(True)


def encoder_of(adapter: Adapter) -> Encoder:
    """Return the encoder of virtual tokens or of the one prefix: none, MLP(BiLSTM(E)), or W2·tanh(W1·E)."""
    side = next(side for _, side in adapter.side_paths() if isinstance(side, VirtualTokens | Prefix))
    if isinstance(side, Prefix):
        (name,) = side.names
        rows = Rows(side, name)
        return Encoder(rows.pairs, lambda: torch.cat([rows.row(i) for i in range(rows.count)], dim=1))
    ours = dict(side.named_parameters())
    embeddings = _leaf(ours["prompt_embeddings"])
    pairs: Pairs = [(ours["prompt_embeddings"], embeddings)]
    if len(ours) == 1:
        return Encoder(pairs, lambda: embeddings)
    width, hidden = embeddings.shape[1], ours["encoder.0.weight_hh_l0"].shape[1]
    lstm = nn.LSTM(width, hidden, num_layers=2, bidirectional=True, batch_first=True)
    first, last = nn.Linear(2 * hidden, 2 * hidden), nn.Linear(2 * hidden, width)
    for prefix, module in (("encoder.0", lstm), ("encoder.1", first), ("encoder.3", last)):
        for name, p in module.named_parameters():
            with torch.no_grad():
                p.copy_(ours[f"{prefix}.{name}"])
            pairs.append((ours[f"{prefix}.{name}"], p))
    return Encoder(pairs, lambda: last(torch.relu(first(lstm(embeddings[None])[0][0]))))


class Rows:
    """The keys and values of one group of attentions, (P, w) each."""

    def __init__(self, prefix: Prefix, group: str) -> None:
        ours: dict[str, Any] = dict(prefix.table(group).named_parameters())
        self.leaves = {name: _leaf(p) for name, p in ours.items()}
        self.pairs: Pairs = [(ours[name], leaf) for name, leaf in self.leaves.items()]
        places = prefix.table(group).places
        self.count, self.width = len(places), places[0].width

    def row(self, index: int) -> Tensor:
        """Return (P, w) of attention number `index`."""
        own = self.leaves
        if "weight" in own:
            return own["weight"][:, index * self.width : (index + 1) * self.width]
        hidden = torch.tanh(F.linear(own["embedding"], own["inner.weight"], own["inner.bias"]))
        return F.linear(hidden, own[f"outer.{index}.weight"], own[f"outer.{index}.bias"])
