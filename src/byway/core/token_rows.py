"""Train chosen rows of an embedding or of a head (new tokens), also in the modules that share the weight.

* :class:`TrainedRows` owns the rows of one module.
* :class:`TiedRows` reads the same rows in another module whose weight is tied to the first one's.
* :func:`trained_rows` places both from what a user writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from byway.core.copies import Copy, TrainedBias, tied_to
from byway.core.families import facts, input_embedding
from byway.core.slots import ModuleRef, SidePath, Site, base_modules, first
from byway.core.weights import dense, is_embedding, is_linear, is_transposed
from byway.errors import TargetError, listed

__all__ = ["TiedRows", "TrainedRows", "frozen_head", "keeps_tie", "trained_rows", "vocabulary"]


class TrainedRows(SidePath):
    """W'[i] for chosen i: trains these rows of an embedding or a head (V, d); all others stay the base's.

    An embedding looks them up; a head computes the logits of these tokens from them: x·W'[i] + b[i].
    """

    peft_names = {"rows": "token_adapter.trainable_tokens_delta"}  # noqa: RUF012 - a constant of the class
    indices: Tensor
    place: Tensor

    def __init__(self, module: nn.Module, indices: tuple[int, ...]) -> None:
        super().__init__()
        weight = dense(module).detach()
        chosen = torch.tensor(indices, device=weight.device)
        self.base = ModuleRef(module)
        self.rows = nn.Parameter(weight[chosen].to(torch.promote_types(weight.dtype, torch.float32)).clone())
        self.register_buffer("indices", chosen, persistent=False)
        place = torch.full((len(weight),), -1, dtype=torch.long, device=weight.device)
        place[chosen] = torch.arange(len(indices), device=weight.device)
        self.register_buffer("place", place, persistent=False)

    def after(self, inputs: dict[str, Any], out: Tensor) -> Tensor:
        return self.read(self.base.module, first(inputs), out)

    def read(self, module: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """Put what the trained rows give for `x` into `out`, the output of `module`, which has these rows."""
        if is_embedding(module):
            factor, place = _factor(module), self.place[x]  # (b, t), -1 where the base's row is kept
            rows = self.rows[place.clamp_min(0)].to(out.dtype)
            return torch.where((place >= 0)[..., None], rows if factor == 1 else rows * factor, out)
        logits = x @ self.rows.to(x.dtype).T  # (b, t, n)
        bias = module._parameters.get("bias")
        logits = logits if bias is None else logits + bias[self.indices]
        return out.index_copy(-1, self.indices, logits.to(out.dtype))

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = tensors["weight"].clone()
        weight[self.indices] = self.rows.detach().to(weight.dtype)
        return tensors | {"weight": weight}


class TiedRows(SidePath):
    """The rows of another module whose weight this one shares: a tied head, a decoder's embedding. No own tensors."""

    def __init__(self, rows: TrainedRows, module: nn.Module) -> None:
        super().__init__()
        self.owner = ModuleRef(rows)
        self.base = ModuleRef(module)

    @property
    def source(self) -> TrainedRows:
        """The side path that owns the rows."""
        assert isinstance(self.owner.module, TrainedRows)
        return self.owner.module

    def after(self, inputs: dict[str, Any], out: Tensor) -> Tensor:
        return self.source.read(self.base.module, first(inputs), out)

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.source.fold(tensors)


def _factor(module: nn.Module) -> float:
    """Return the factor by which an embedding multiplies its rows (transformers' BART, Gemma 3), else 1."""
    found = vars(module).get("embed_scale", module._buffers.get("embed_scale"))
    return 1.0 if found is None else float(found)


def trained_rows(model: nn.Module, tokens: Sequence[int] | Mapping[str, Sequence[int]]) -> Iterator[tuple[Site, SidePath]]:
    """Yield the side paths that train rows, as HF peft's ``trainable_token_indices`` places them.

    Args:
        model: any model; the modules that share a weight are found in it.
        tokens: ids, for the input embedding and everything tied to it; or the name of an embedding or head (its path
            or the end of it) → ids. Of tied modules, those named train their own rows, unless the input embedding is
            named and all named ones have the same ids: then the tie is kept.

    Raises:
        TargetError: no such module, or ids that it does not have.
    """
    modules = dict(base_modules(model))
    source = input_embedding(model)
    if not tokens:
        return
    if not isinstance(tokens, Mapping):
        if source is None or not is_embedding(modules[source]):
            what = f"trained_tokens: {type(model).__name__} has no embedding that is known to be of tokens"
            raise TargetError(what, "trained_tokens: {NAME: [ids]} names one")
        tokens = {source: tokens}
    named: dict[str, tuple[int, ...]] = {}
    for name, ids in tokens.items():
        found = [path for path in modules if path == name or path.endswith(f".{name}")]
        rows = [path for path in found if is_embedding(modules[path]) or (is_linear(modules[path]) and not is_transposed(modules[path]))]
        if not rows:
            has = [path for path, module in modules.items() if is_embedding(module)]
            wrong = f"{found[0]} is a {type(modules[found[0]]).__name__}" if found else f"there is no module {name}"
            raise TargetError(f"trained_tokens: {wrong}", f"name an embedding or a head; embeddings: {listed(has)}")
        named |= dict.fromkeys(rows, tuple(ids))
    tied = tied_to(model, source) if source is not None and source in named else ()
    followers = tied if all(path not in named or named[path] == named.get(source or "") for path in tied) else ()
    for path, ids in named.items():
        if path in followers:
            continue
        module = modules[path]
        size = len(dense(module))
        if len(set(ids)) != len(ids) or not all(0 <= token < size for token in ids):
            raise TargetError(f"trained_tokens: {path} has the ids 0 to {size - 1}, each at most once; they are {list(ids)}")
        side = TrainedRows(module, ids)
        yield Site(path, module), side
        if path == source:
            yield from ((Site(other, modules[other]), TiedRows(side, modules[other])) for other in followers)


def vocabulary(model: nn.Module) -> list[str]:
    """Return the paths of the input embedding and of a head that is not tied to it; those that the model has."""
    source, head = input_embedding(model), facts(model).head
    tied = tied_to(model, source) if source is not None else ()
    return [path for path in (source, head) if path is not None and path not in tied]


def frozen_head(model: nn.Module, tokens: Sequence[int] | Mapping[str, Sequence[int]]) -> str | None:
    """Return the path of an output head whose rows stay frozen although those of the input embedding are trained."""
    head = facts(model).head
    trained = {site.path for site, _ in trained_rows(model, tokens)}
    return head if head is not None and input_embedding(model) in trained and head not in trained else None


def keeps_tie(ends: Sequence[Sequence[nn.Module]]) -> bool:
    """True if the side paths at the ends of a tie (one sequence per end) change all ends equally."""

    def trained(side: nn.Module) -> list[nn.Parameter]:
        if isinstance(side, TiedRows):
            return [side.source.rows]
        # copies and biases of tied modules share their tensors
        return list(side.parameters()) if isinstance(side, Copy | TrainedBias | TrainedRows) else []

    return bool(set.intersection(*({id(p) for side in sides for p in trained(side)} for sides in ends)))
