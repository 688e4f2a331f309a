"""Side blocks that start as pruned copies of the backbone's blocks (Sung et al., arXiv 2206.06522 §3.3).

Whole coordinates are kept, the most important 1/ρ of each kind, in their order:

* Residual stream: the columns of the embedding, by the sum of their importance. They are chosen once per stack, so that
  a block reads and adds the same coordinates. Norms and biases of length d are cut with them.
* Head: the rows of q, k and v, with inputs restricted to the kept coordinates, by the product of the three sums. They
  are chosen for each key/value head and the query heads that share it, so all heads stay and scores are still products
  of matching coordinates. With rotary positions, the two coordinates of a pair are kept or dropped together.
* Feed-forward part: the rows of the maps into it, by the product of their sums.

The output map of the attention and the map out of the feed-forward part take the kept columns and rows. A relative
position bias is copied whole.

Notation: d width, h query heads, g key/value heads, e head size, f feed-forward width; primes mark the kept sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from byway.core.families import input_embedding
from byway.core.families.blocks import Attention, Kind
from byway.core.families.facts import find
from byway.core.weights import dense, is_embedding, is_linear, is_transposed
from byway.errors import TargetError
from byway.methods.ladder.importance import Importance

__all__ = ["Pruning", "readable", "residual"]


def residual(home: nn.Module, config: Any, importance: Importance, reduction: int) -> Tensor:
    """Return the kept coordinates of the residual stream, (d/ρ,)."""
    width = config.hidden_size
    return _best(_entry(home, width, importance), width // reduction)


def _entry(home: nn.Module, width: int, importance: Importance) -> Tensor:
    """Return the importance of each coordinate, (d,), from the token embedding, or a projection or patch embedding."""
    known = input_embedding(home)  # not the table of positions
    for module in home.modules() if known is None else [home.get_submodule(known)]:
        if isinstance(module, nn.Embedding) and module.embedding_dim == width:
            return importance(module).sum(dim=0)
    for module in home.modules():
        if is_linear(module) and _rows(module, dense(module)).shape[0] == width:
            return _rows(module, importance(module)).sum(dim=1)
        if isinstance(module, nn.Conv2d) and module.out_channels == width:
            return importance(module).flatten(1).sum(dim=1)
    raise TargetError("nothing in this model shows how important the coordinates of its states are", "choose init: random")


def readable(home: nn.Module, layers: list[nn.Module]) -> list[nn.Module]:
    """Return the modules whose importance is used: the maps in `layers`, and all that may write the first states."""
    inside = {id(m) for m in home.modules() if isinstance(m, nn.ModuleList) for m in m.modules()}
    outside = [m for m in home.modules() if id(m) not in inside]
    entries = [m for m in outside if is_linear(m) or is_embedding(m) or isinstance(m, nn.Conv2d)]
    return [*(m for layer in layers for m in layer.modules() if is_linear(m)), *entries]


@dataclass(frozen=True)
class Pruning:
    """Choose the coordinates of one stack's blocks and copy them into its side blocks."""

    kind: Kind
    importance: Importance
    config: Any
    reduction: int
    table: nn.Module | None
    """The relative position bias of the backbone's first block."""
    width: Tensor
    """(d',): kept coordinates of the residual stream."""
    encoder: Tensor
    """(d',): those of the encoder, which a cross-attention reads."""

    @torch.no_grad()
    def fill(self, pairs: Mapping[nn.Module, nn.Module]) -> None:
        """Fill each side block (the values of `pairs`) from its backbone block (the key), which is not changed."""
        for block, side in pairs.items():
            self._block(block, side)

    def _block(self, block: nn.Module, side: nn.Module) -> None:
        modules, narrow = dict(block.named_modules()), dict(side.named_modules())
        done: set[str] = set()

        def cut(path: str, rows: Tensor, columns: Tensor) -> None:
            done.add(path)
            source, target = modules[path], narrow[path]
            target.weight.copy_(_rows(target, _rows(source, dense(source)).cpu()[rows][:, columns]))  # pyright: ignore
            if target.bias is not None:
                target.bias.copy_(source.bias.cpu()[rows])  # pyright: ignore

        heads = [self._attention(attention, modules, cut) for attention in self.kind.attentions if attention.output in modules]
        ups = [path for pattern in self.kind.ups for path in modules if find(pattern).fullmatch(path)]
        down = next(path for path in modules if find(self.kind.down).fullmatch(path))
        scores = [self._score(modules[path], self.width) for path in ups]
        inner = _best(torch.stack(scores).prod(dim=0), len(scores[0]) // self.reduction)
        for path in ups:
            cut(path, inner, self.width)
        cut(down, self.width, inner)
        for path, module in narrow.items():
            if path not in done and is_embedding(module):
                assert self.table is not None
                module.load_state_dict(self.table.state_dict())  # the number of heads is not reduced
            elif path not in done and path in modules:
                self._vectors(modules[path], module, heads[0])

    def _attention(self, attention: Attention, modules: Mapping[str, nn.Module], cut: Callable[[str, Tensor, Tensor], None]) -> Tensor:
        """Cut the maps of one attention; return the coordinates kept in the first head, (e/ρ,)."""
        source = self.encoder if attention.cross else self.width
        q = self._score(modules[attention.query], self.width)  # (h·e,); of a fused map, those of q, k and v
        if attention.fused:
            q, k, v = q.chunk(3)
        else:
            k, v = self._score(modules[attention.key], source), self._score(modules[attention.value], source)  # (g·e,)
        heads = self.config.num_attention_heads
        size = len(q) // heads  # e
        groups = len(k) // size  # g
        score = q.reshape(groups, -1, size).sum(dim=1) * k.reshape(groups, size) * v.reshape(groups, size)  # (g, e)
        if self.kind.head_norms:
            score = score.sum(dim=0, keepdim=True).expand_as(score)
        kept = torch.stack([self._in_head(one) for one in score])  # (g, e')
        start = size * torch.arange(groups)[:, None]
        of_keys = (kept + start).flatten()
        per_head = kept.repeat_interleave(heads // groups, dim=0)
        of_queries = (per_head + size * torch.arange(heads)[:, None]).flatten()
        if attention.fused:
            cut(attention.query, torch.cat([of_queries, of_queries + len(q), of_queries + 2 * len(q)]), self.width)
        else:
            cut(attention.query, of_queries, self.width)
            cut(attention.key, of_keys, source)
            cut(attention.value, of_keys, source)
        cut(attention.output, self.width, of_queries)
        return kept[0]

    def _in_head(self, score: Tensor) -> Tensor:
        """Return the kept coordinates of one head, (e/ρ,); a rotated pair (j, j + e/2) is kept or dropped whole."""
        if self.kind.rotary is None:
            return _best(score, len(score) // self.reduction)
        half = len(score) // 2
        pairs = _best(score[:half] + score[half:], half // self.reduction)
        return torch.cat([pairs, pairs + half])

    def _score(self, module: nn.Module, columns: Tensor) -> Tensor:
        return _rows(module, self.importance(module))[:, columns.to(module.weight.device)].sum(dim=1)  # pyright: ignore

    def _vectors(self, module: nn.Module, narrow: nn.Module, head: Tensor) -> None:
        """Copy norms: over the residual stream, the kept coordinates; over a head, those of the first head."""
        wide = dict(module.named_parameters(recurse=False))
        for name, tensor in narrow.named_parameters(recurse=False):
            if wide[name].shape == tensor.shape:
                tensor.copy_(wide[name])
            elif len(wide[name]) == self.config.hidden_size:
                tensor.copy_(wide[name].cpu()[self.width])
            elif self.kind.head_norms and len(tensor) == len(head):
                tensor.copy_(wide[name].cpu()[head])
            else:
                raise TargetError(f"a vector of length {len(wide[name])} in {type(module).__name__} belongs to no kept coordinates")


def _best(score: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` highest scores, in ascending order; ties go to the lower index."""
    order = torch.sort(score, descending=True, stable=True).indices
    return order[:count].sort().values


def _rows(module: nn.Module, tensor: Tensor) -> Tensor:
    """Return the tensor as (out, in), whatever the module's layout."""
    return tensor.T if is_transposed(module) else tensor
