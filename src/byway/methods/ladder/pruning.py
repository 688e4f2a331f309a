"""Side blocks that start as pruned copies of the backbone's blocks (Sung et al., arXiv 2206.06522 §3.3).

Whole coordinates are kept, 1/ρ of each kind, the most important ones, in their order:

* the residual stream: columns of the embedding by the sum of their importance, once for a stack, so that what a block adds and what it
  passes on are the same coordinates; norms and biases that are d long are cut with them;
* a head: rows of q, k and v, with inputs restricted to the kept coordinates, by the product of the three sums, for each key/value head and
  the query heads that share it, so that all heads stay and a score is still a product of matching coordinates. Where positions are rotated,
  the two coordinates of a pair are kept or dropped together;
* the feed-forward part: rows of the maps into it by the product of their sums.

Then o and the map out of the feed-forward part take the kept columns and rows. A relative position bias is copied whole.

Legend: d width, h query heads, g key/value heads, e head size, f feed-forward width; primes are what is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from byway.core.families.blocks import Attention, Kind
from byway.core.families.facts import find
from byway.core.weights import dense, is_embedding, is_linear, is_transposed
from byway.errors import TargetError
from byway.methods.ladder.importance import Importance

__all__ = ["prune", "readable", "residual"]


@dataclass(frozen=True)
class _Walk:
    kind: Kind
    importance: Importance
    config: Any
    reduction: int
    table: nn.Module | None
    """The relative position bias of the backbone's first block."""
    width: Tensor
    """(d',) kept coordinates of the residual stream."""
    encoder: Tensor
    """(d',) those of the encoder that a cross-attention reads."""


def residual(home: nn.Module, config: Any, importance: Importance, reduction: int) -> Tensor:
    """(d/ρ,) the coordinates of the residual stream that are kept."""
    width = config.hidden_size
    return _best(_entry(home, width, importance), width // reduction)


def _entry(home: nn.Module, width: int, importance: Importance) -> Tensor:
    """(d,) importance of each coordinate in what writes the first states: the vocabulary, else a projection, else image patches."""
    for module in home.modules():
        if isinstance(module, nn.Embedding) and module.embedding_dim == width:
            return importance(module).sum(dim=0)
    for module in home.modules():
        if is_linear(module) and _rows(module, dense(module)).shape[0] == width:
            return _rows(module, importance(module)).sum(dim=1)
        if isinstance(module, nn.Conv2d) and module.out_channels == width:
            return importance(module).flatten(1).sum(dim=1)
    raise TargetError("nothing in this model shows how important the coordinates of its states are", "choose init: random")


def readable(home: nn.Module, layers: list[nn.Module]) -> list[nn.Module]:
    """The modules whose importance decides: the maps in `layers`, and outside all layers what may write the first states."""
    inside = {id(m) for m in home.modules() if isinstance(m, nn.ModuleList) for m in m.modules()}
    outside = [m for m in home.modules() if id(m) not in inside]
    entries = [m for m in outside if is_linear(m) or is_embedding(m) or isinstance(m, nn.Conv2d)]
    return [*(m for layer in layers for m in layer.modules() if is_linear(m)), *entries]


def prune(
    kind: Kind,
    config: Any,
    reduction: int,
    pairs: Mapping[nn.Module, nn.Module],
    importance: Importance,
    table: nn.Module | None,
    width: Tensor,
    encoder: Tensor,
) -> None:
    """Fill each side block (the values of `pairs`) from its backbone block (the key), which stays as it is."""
    walk = _Walk(kind, importance, config, reduction, table, width, encoder)
    with torch.no_grad():
        for block, side in pairs.items():
            _block(walk, block, side)


def _block(walk: _Walk, block: nn.Module, side: nn.Module) -> None:
    modules, narrow = dict(block.named_modules()), dict(side.named_modules())
    done: set[str] = set()

    def cut(path: str, rows: Tensor, columns: Tensor) -> None:
        done.add(path)
        _copy(modules[path], narrow[path], rows, columns)

    heads = [_attention(walk, attention, modules, cut) for attention in walk.kind.attentions if attention.output in modules]
    ups = [path for pattern in walk.kind.ups for path in modules if find(pattern).fullmatch(path)]
    down = next(path for path in modules if find(walk.kind.down).fullmatch(path))
    scores = [_score(walk.importance, modules[path], walk.width) for path in ups]
    inner = _best(torch.stack(scores).prod(dim=0), len(scores[0]) // walk.reduction)
    for path in ups:
        cut(path, inner, walk.width)
    cut(down, walk.width, inner)
    for path, module in narrow.items():
        if path not in done and is_embedding(module):
            assert walk.table is not None
            module.load_state_dict(walk.table.state_dict())  # heads are not reduced
        elif path not in done and path in modules:
            _vectors(walk, modules[path], module, heads[0])


def _attention(walk: _Walk, attention: Attention, modules: Mapping[str, nn.Module], cut: Callable[[str, Tensor, Tensor], None]) -> Tensor:
    """Cuts the maps of one attention; (e/ρ,) the coordinates kept in the first head."""
    source = walk.encoder if attention.cross else walk.width
    q, k, v = _query_key_value(walk, attention, modules, source)
    heads = walk.config.num_attention_heads
    size = len(q) // heads  # e
    groups = len(k) // size  # g
    score = q.reshape(groups, -1, size).sum(dim=1) * k.reshape(groups, size) * v.reshape(groups, size)  # (g, e)
    if walk.kind.head_norms:
        score = score.sum(dim=0, keepdim=True).expand_as(score)
    kept = torch.stack([_in_head(walk, one) for one in score])  # (g, e')
    start = size * torch.arange(groups)[:, None]
    of_keys = (kept + start).flatten()
    per_head = kept.repeat_interleave(heads // groups, dim=0)
    of_queries = (per_head + size * torch.arange(heads)[:, None]).flatten()
    if attention.fused:
        cut(attention.query, torch.cat([of_queries, of_queries + len(q), of_queries + 2 * len(q)]), walk.width)
    else:
        cut(attention.query, of_queries, walk.width)
        cut(attention.key, of_keys, source)
        cut(attention.value, of_keys, source)
    cut(attention.output, walk.width, of_queries)
    return kept[0]


def _query_key_value(walk: _Walk, attention: Attention, modules: Mapping[str, nn.Module], source: Tensor) -> tuple[Tensor, ...]:
    """(h·e,), (g·e,), (g·e,): the importance of each row, inputs restricted."""
    if attention.fused:
        return _score(walk.importance, modules[attention.query], walk.width).chunk(3)
    return (
        _score(walk.importance, modules[attention.query], walk.width),
        _score(walk.importance, modules[attention.key], source),
        _score(walk.importance, modules[attention.value], source),
    )


def _in_head(walk: _Walk, score: Tensor) -> Tensor:
    """(e,) → (e/ρ,) kept coordinates of one head; rotated pairs (j, j + e/2) together, so that pairs stay pairs."""
    if walk.kind.rotary is None:
        return _best(score, len(score) // walk.reduction)
    half = len(score) // 2
    pairs = _best(score[:half] + score[half:], half // walk.reduction)
    return torch.cat([pairs, pairs + half])


def _best(score: Tensor, count: int) -> Tensor:
    """The indices of the `count` highest, in ascending order; of equals the first."""
    order = torch.sort(score, descending=True, stable=True).indices
    return order[:count].sort().values


def _score(importance: Importance, module: nn.Module, columns: Tensor) -> Tensor:
    return _rows(module, importance(module))[:, columns.to(module.weight.device)].sum(dim=1)  # pyright: ignore


def _rows(module: nn.Module, tensor: Tensor) -> Tensor:
    """As (out, in), whatever the module's layout."""
    return tensor.T if is_transposed(module) else tensor


def _copy(module: Any, narrow: Any, rows: Tensor, columns: Tensor) -> None:
    weight = _rows(module, dense(module)).cpu()[rows][:, columns]
    narrow.weight.copy_(_rows(narrow, weight))
    if narrow.bias is not None:
        narrow.bias.copy_(module.bias.cpu()[rows])


def _vectors(walk: _Walk, module: nn.Module, narrow: nn.Module, head: Tensor) -> None:
    """Norms: a vector over the residual stream is cut with it, one over a head with the first head's coordinates (all heads' are equal)."""
    wide = dict(module.named_parameters(recurse=False))
    for name, tensor in narrow.named_parameters(recurse=False):
        if wide[name].shape == tensor.shape:
            tensor.copy_(wide[name])
        elif len(wide[name]) == walk.config.hidden_size:
            tensor.copy_(wide[name].cpu()[walk.width])
        elif walk.kind.head_norms and len(tensor) == len(head):
            tensor.copy_(wide[name].cpu()[head])
        else:
            raise TargetError(f"a vector of length {len(wide[name])} in {type(module).__name__} belongs to no kept coordinates")
