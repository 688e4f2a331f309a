"""Base tensors that are trained all the same: as copies beside the base, so that disabling, switching and detaching stay exact.

* :class:`Copy` a whole module: the copy answers in its place; :class:`TrainedCopy` is that of a task head or an output head.
* :class:`TrainedBias` b' beside b: out + (b' − b).
* :class:`TrainedRows` chosen rows of an embedding (new tokens), and of the embeddings and the head tied to it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from byway.core.slots import Ref, SidePath, base_modules
from byway.core.weights import is_linear, is_quantized, plain, widened

__all__ = [
    "Copy",
    "TiedRows",
    "TrainedBias",
    "TrainedCopy",
    "TrainedHeadRows",
    "TrainedRows",
    "bare_copy",
    "keeps_tie",
    "rows_of_tied",
    "tied_note",
    "tied_to",
]


class Copy(SidePath):
    """y = copy(x): a trained copy of a whole module answers in its place; the module itself stays as it was.

    Floating-point tensors of the copy are float32 unless the base is float64; inputs are cast to them and the output back.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        bare = bare_copy(module)
        kept = next((p.dtype for p in bare.parameters() if p.is_floating_point()), torch.float32)
        self.base_dtype = torch.float32 if widened(module) else kept
        self.dtype = torch.float64 if any(p.dtype == torch.float64 for p in bare.parameters()) else torch.float32
        self.copy = bare.to(self.dtype).requires_grad_(True)

    def instead(self, module: nn.Module, inputs: dict[str, Any]) -> Any:
        surplus = inputs.pop("*", ())
        if surplus:
            raise TypeError(f"{type(module).__name__} takes a variable number of arguments: it cannot be trained as a copy")
        # what looks vectors up is given whole numbers: it answers in the dtype that the module itself would
        given = next((v.dtype for v in inputs.values() if isinstance(v, Tensor) and v.is_floating_point()), self.base_dtype)
        if given == self.dtype:
            return self.copy(**inputs)
        return _cast(self.copy(**{name: _cast(value, self.dtype) for name, value in inputs.items()}), given)

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        own = self.copy.state_dict()
        return {name: own[name].detach().clone() for name in tensors}


class TrainedCopy(Copy):
    """A module to save (a task head, an output head): a copy that files hold under the module's own names."""

    def export(self) -> dict[str, Tensor]:
        return dict(self.copy.state_dict())


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """`value` with its floating-point tensors in `dtype`, also inside a tuple."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return tuple(_cast(part, dtype) for part in value) if type(value) is tuple else value


def bare_copy(module: nn.Module) -> nn.Module:
    """A deep copy without what hangs on the module: no slots, no hooks, no instance forward."""
    if is_quantized(module):
        return plain(module)
    twin = copy.deepcopy(module)
    for _, part in base_modules(twin):
        part._modules.pop("byway", None)
        part.__dict__.pop("forward", None)
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return twin


class TrainedBias(SidePath):
    """y = f(x) + (b' − b): the bias b of a module, trained as b'."""

    def __init__(self, module: nn.Module, *, adapted: bool) -> None:
        super().__init__()
        base = module.bias
        if not isinstance(base, Tensor):
            raise TypeError(f"{type(module).__name__} has no bias")
        self.base = Ref(module)
        self.bias = nn.Parameter(base.detach().clone().to(torch.promote_types(base.dtype, torch.float32)))
        # peft keeps the bias of a module that it wraps below `base_layer`
        self.peft_names = {"bias": "base_layer.bias" if adapted else "bias"}
        self.channels_first = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.GroupNorm | nn.modules.batchnorm._NormBase)

    def delta(self) -> Tensor:
        """b' − b, over all output features."""
        base = self.base.module.bias
        return self.bias - base if isinstance(base, Tensor) else self.bias

    def after(self, inputs: dict[str, Any], out: Tensor) -> Tensor:
        return out + self.delta().to(out.dtype).reshape(-1, *(1,) * (out.ndim - 2 if self.channels_first else 0))

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        # a delta, so that an output bias which another side path has already folded in is kept
        return tensors | {"bias": tensors["bias"] + self.delta().detach().to(tensors["bias"].dtype)}


class TrainedRows(SidePath):
    """E'[i] for chosen i: rows of an embedding (d wide) that are trained; all others stay the base's."""

    peft_names = {"rows": "token_adapter.trainable_tokens_delta"}  # noqa: RUF012 - a constant of the class
    indices: Tensor

    def __init__(self, module: nn.Embedding, indices: tuple[int, ...]) -> None:
        super().__init__()
        weight = module.weight.detach()
        chosen = torch.tensor(indices, device=weight.device)
        self.rows = nn.Parameter(weight[chosen].to(torch.promote_types(weight.dtype, torch.float32)).clone())
        self.register_buffer("indices", chosen, persistent=False)
        place = torch.full((module.num_embeddings,), -1, dtype=torch.long, device=weight.device)
        place[chosen] = torch.arange(len(indices), device=weight.device)
        self.place: Tensor
        self.register_buffer("place", place, persistent=False)
        self.factor = _factor(module)

    def after(self, inputs: dict[str, Any], out: Tensor) -> Tensor:
        return self.replaced(next(iter(inputs.values())), out, self.factor)

    def replaced(self, ids: Tensor, out: Tensor, factor: float) -> Tensor:
        """`out` (b, t, d) of an embedding that multiplies by `factor`, with the trained rows in it."""
        place = self.place[ids]  # (b, t), -1 where the base's row stays
        rows = self.rows[place.clamp_min(0)].to(out.dtype)
        return torch.where((place >= 0)[..., None], rows if factor == 1 else rows * factor, out)

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = tensors["weight"].clone()
        weight[self.indices] = self.rows.detach().to(weight.dtype)
        return tensors | {"weight": weight}


class TrainedHeadRows(SidePath):
    """Logits of chosen tokens from the trained rows of the embedding that the head is tied to; owns no tensor itself."""

    def __init__(self, rows: TrainedRows) -> None:
        super().__init__()
        self.tied = Ref(rows)

    def after(self, inputs: dict[str, Any], out: Tensor) -> Tensor:
        rows = self.tied.module
        assert isinstance(rows, TrainedRows)
        hidden = next(iter(inputs.values()))  # (b, t, d)
        logits = hidden @ rows.rows.to(hidden.dtype).T  # (b, t, n)
        return out.index_copy(-1, rows.indices, logits.to(out.dtype))

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = self.tied.module
        assert isinstance(rows, TrainedRows)
        return rows.fold(tensors)


class TiedRows(TrainedHeadRows):
    """The same rows in another embedding that shares the weight (T5's and BART's encoder and decoder each have one)."""

    def __init__(self, rows: TrainedRows, module: nn.Module) -> None:
        super().__init__(rows)
        self.factor = _factor(module)

    def after(self, inputs: dict[str, Any], out: Tensor) -> Tensor:
        rows = self.tied.module
        assert isinstance(rows, TrainedRows)
        return rows.replaced(next(iter(inputs.values())), out, self.factor)


def rows_of_tied(model: nn.Module, rows: TrainedRows, paths: Sequence[str]) -> Iterator[tuple[str, nn.Module, SidePath]]:
    """(path, module, side path) for those of `paths`, which share the weight of the embedding whose `rows` are trained."""
    modules = dict(base_modules(model))
    for path in paths:
        module = modules[path]
        if isinstance(module, nn.Embedding):
            yield path, module, TiedRows(rows, module)
        elif is_linear(module):
            yield path, module, TrainedHeadRows(rows)


def _factor(module: nn.Module) -> float:
    """What the embedding multiplies its rows by, as transformers' scaled ones do (BART, Gemma 3)."""
    found = vars(module).get("embed_scale", module._buffers.get("embed_scale"))
    return 1.0 if found is None else float(found)


def tied_to(model: nn.Module, path: str) -> tuple[str, ...]:
    """Paths of the other modules whose ``weight`` is the very same tensor as that of the module at `path`."""
    modules = dict(base_modules(model))
    weight = modules[path]._parameters.get("weight")
    if weight is None:
        return ()
    return tuple(p for p, m in modules.items() if p != path and m._parameters.get("weight") is weight)


def keeps_tie(ends: Sequence[Sequence[nn.Module]]) -> bool:
    """Whether what hangs on the ends of a tie (side paths, for each end) changes them alike, so that a merge need not untie them."""
    if any(isinstance(side, TrainedHeadRows) for hung in ends for side in hung):
        return True
    # copies that were tied like the base share their tensors
    trained = [{id(p) for side in hung if isinstance(side, Copy) for p in side.parameters()} for hung in ends]
    return bool(set.intersection(*trained))


def tied_note(model: nn.Module, site: Any) -> str:
    """What happens to tied weights when the module of `site` is trained as a copy, in one sentence; ``""`` if nothing is tied."""
    others = tied_to(model, site.path)
    if not others:
        return ""
    return f"{site.path} shares its weight with {', '.join(others)}: the trained copy is untied, the other stays as it was"
