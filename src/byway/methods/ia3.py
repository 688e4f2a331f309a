r"""(IA)³: K ← l_k∘K, V ← l_v∘V, and the feed-forward part's hidden vector h ← l_ff∘h before its second matrix; every l starts at one.

::

    x ──── W_k, W_v (frozen) ────(×)──── k, v         h ────(×)──── W_2 (frozen) ──── y
                                  │                          │
                               l (out,)                   l (in,)

On a linear map: y = l∘(Wx + b) scales the output, y = W(l∘x) + b the input. No scale, no dropout, no product of matrices: it costs one
multiplication and folds into the rows of W and b, or into the columns of W.

Source: Liu et al., arXiv 2205.05638 §3.3 (T-Few). T-Few's code scales the output of ``wi_1``, which is the same: h = act(wi_0 x)∘wi_1 x.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from byway.core.method import BuildContext, Method
from byway.core.slots import SidePath, Site
from byway.core.weights import device_of, features, is_conv, is_linear, is_transposed
from byway.errors import ConfigError, TargetError

if TYPE_CHECKING:
    from byway.core.families import Facts
    from byway.core.method import Attached

__all__ = ["IA3", "BlockScale", "InputScale", "OutputScale"]


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Learned vectors that multiply keys, values and the feed-forward part's hidden activations.

    Attaching leaves the output as it is: every vector starts at one. Weight decay is not applied to the vectors, since it would pull them
    to zero. Trained: d_k + d_v + d_ff numbers a layer, d_k + d_v more where a decoder layer attends to an encoder.

    Raises:
        ConfigError: an empty list of targets.
        TargetError: something named is not in the model or is no linear map or convolution, or the places cannot be told.
    """

    targets: str | Sequence[str] | None = None
    """Linear maps to scale; none: those that give keys and values, and those that feed-forward parts end with."""
    feed_forward: str | Sequence[str] | None = None
    """Which of them are scaled at their input; none: those that feed-forward parts end with. An empty list: none of them."""
    exclude: str | Sequence[str] | None = None
    """Modules to leave out, written like `targets`."""
    layers: str | int | Sequence[int | str] | None = None
    """Layers to adapt, counted per stack: indices, or ranges such as ``16-``."""

    peft_type: ClassVar[str | None] = "IA3"
    mergeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets is not None and not self.targets:
            raise ConfigError("targets is empty: nothing would be scaled", "leave it out for the places of the paper")

    def sites(self, model: nn.Module) -> Iterator[Site]:
        from byway.core.targets.resolve import resolve

        usual = None if self.targets is not None else self._usual(model)
        yield from resolve(model, self.targets, exclude=self.exclude, layers=self.layers, accepts=_scalable, usual=usual)

    def notes(self, model: nn.Module) -> tuple[str, ...]:
        from byway.core.families import facts

        there = facts(model)
        if self.targets is None and self.feed_forward is None and not there.feed_forward_outputs:
            return ("keys and values only: the feed-forward parts end in no linear map (experts are 3-D parameters)",)
        return ()

    def _usual(self, model: nn.Module) -> list[str]:
        """The places of the paper: keys, values, and the input of the feed-forward parts' last map."""
        from byway.core.families import facts

        there = facts(model)
        found = dict.fromkeys([*there.projections("k"), *there.projections("v")])
        if not found:
            raise TargetError(
                f"which linear maps of {type(model).__name__} give keys and values cannot be told",
                "name them: targets=['k_proj', 'v_proj', 'down_proj'], feed_forward=['down_proj']",
            )
        return [*found, *self._at_input(model)]

    def _at_input(self, model: nn.Module) -> list[str]:
        """The paths of what is scaled at its input, if it is a target."""
        from byway.core.families import facts
        from byway.core.targets.resolve import resolve

        if self.feed_forward is None:
            return list(facts(model).feed_forward_outputs)
        if not self.feed_forward:
            return []
        return [site.path for site in resolve(model, self.feed_forward, accepts=_scalable)]

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        at_input = context.shared.get(_AT_INPUT)
        if at_input is None:
            at_input = context.shared[_AT_INPUT] = frozenset(self._at_input(model))
            context.shared[_FACTS] = _facts(model)
        if site.path in at_input:
            return InputScale(site.module)
        if self.targets is None:  # the paper scales keys and values: of a map that gives queries too, only their part
            rows = _rows(context.shared[_FACTS], site.path)
            if rows is not None:
                return BlockScale(site.module, rows)
        return OutputScale(site.module)

    def param_groups(self, adapter: Attached, learning_rate: float) -> list[dict[str, Any]]:
        """The vectors without weight decay, whose rest is at zero and not at one; then what is trained whole (heads)."""
        vectors = {id(side.ia3_l) for _, side in adapter.side_paths() if isinstance(side, _Scale)}
        parameters = [p for _, p in adapter.named_parameters()]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if id(p) in vectors], "lr": learning_rate, "weight_decay": 0.0},
            {"params": [p for p in parameters if id(p) not in vectors], "lr": learning_rate},
        ]
        return [group for group in groups if group["params"]]

    def to_peft(self) -> dict[str, Any]:
        return {"init_ia3_weights": True}

    def peft_fields(self, hung: Sequence[tuple[Site, SidePath]], config: Mapping[str, Any]) -> dict[str, Any]:
        """``feedforward_modules`` beside the targets, both spelled out: peft's own tables are not the paper's places."""
        chosen = [site.path for site, _ in hung]
        inputs = [site.path for site, side in hung if isinstance(side, InputScale)]
        names = sorted({path.rpartition(".")[2] for path in inputs})
        any(is_transposed(site.module) for site, _ in hung)
        by_name = [path for path in chosen if path.endswith(tuple(names))] == inputs and set(names) <= set(config["target_modules"])
        fields = {
            "feedforward_modules": names if by_name else sorted(inputs),
            "fan_in_fan_out": any(is_transposed(s.module) for s, _ in hung),
        }
        # peft demands that these be among the targets as they are written
        return fields if by_name or not inputs else fields | {"target_modules": sorted({*config["target_modules"], *inputs})}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> IA3:
        return cls(
            targets=config.get("target_modules"),
            feed_forward=config.get("feedforward_modules"),
            modules_to_save=tuple(config.get("modules_to_save") or ()) or "none",
        )


_AT_INPUT, _FACTS = "ia3: scaled at their input", "ia3: facts"


def _facts(model: nn.Module) -> Facts:
    from byway.core.families import facts

    return facts(model)


def _scalable(module: nn.Module) -> bool:
    return is_linear(module) or is_conv(module)


def _rows(facts: Facts, path: str) -> tuple[int, ...] | None:
    """Which output features of a map are keys or values; None: all of them."""
    runs = [facts.projections(part).get(path) for part in ("k", "v")]
    if any(run is None for run in runs):
        return None
    return tuple(sorted(row for run in runs for start, stop in run or () for row in range(start, stop)))


class _Scale(SidePath):
    """What all of them share: a vector of ones, float32 beside anything but float64."""

    peft_names = {"ia3_l": "ia3_l"}  # noqa: RUF012 - a constant of the class

    def __init__(self, module: nn.Module, *shape: int) -> None:
        super().__init__()
        weight = module.weight
        dtype = torch.float64 if isinstance(weight, Tensor) and weight.dtype == torch.float64 else torch.float32
        self.ia3_l = nn.Parameter(torch.ones(shape, dtype=dtype, device=device_of(module)))
        self.transposed = is_transposed(module)
        self.spatial = _spatial(module)

    def _along(self, vector: Tensor) -> Tensor:
        """`vector` against the feature dimension of what flows: the last, or the second of a convolution."""
        return vector.reshape(-1, *(1,) * self.spatial)


class OutputScale(_Scale):
    """y = l∘f(x), l (out, 1); in a convolution (1, out, 1 …), a number for each channel. W ← diag(l)·W, b ← l∘b."""

    def __init__(self, module: nn.Module) -> None:
        out, spatial = features(module)[1], _spatial(module)
        super().__init__(module, *((1, out, *(1,) * spatial) if spatial else (out, 1)))

    def factor(self) -> Tensor:
        """l as a vector over all output features."""
        return self.ia3_l.flatten()

    def after(self, inputs: dict[str, Any], out: Tensor) -> Tensor:
        # in float32 also beside bfloat16, which has no number between 1 and 1.0078: what is learnt would be rounded away
        return (out * self._along(self.factor())).to(out.dtype)

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = tensors["weight"]
        factor = self.factor().detach().to(weight.dtype)
        rows = factor if self.transposed else factor.reshape(-1, *(1,) * (weight.ndim - 1))
        return {name: tensor * (factor if name == "bias" else rows) for name, tensor in tensors.items()}


class BlockScale(OutputScale):
    """y = l∘f(x) on a fused map, where l is trained for some output features (keys, values) and one for the others (queries).

    Trained is (k, 1) for k of the out features. Files hold all of (out, 1), with ones for the others.
    """

    def __init__(self, module: nn.Module, rows: tuple[int, ...]) -> None:
        super().__init__(module)
        self.out = features(module)[1]
        self.ia3_l = nn.Parameter(self.ia3_l.detach()[: len(rows)].clone())
        self.rows: Tensor
        self.register_buffer("rows", torch.tensor(rows, device=device_of(module)), persistent=False)

    def factor(self) -> Tensor:
        return self.ia3_l.new_ones(self.out).index_copy(0, self.rows, self.ia3_l.flatten())

    def export(self) -> dict[str, Tensor]:
        return {"ia3_l": self.factor().detach()[:, None]}


class InputScale(_Scale):
    """y = f(l∘x), l (1, in); before a convolution (1, in, 1 …). W ← W·diag(l), b stays."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, 1, features(module)[0], *(1,) * _spatial(module))
        self.groups = module.groups if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 1

    def before(self, inputs: dict[str, Any]) -> dict[str, Any]:
        name = next(iter(inputs))
        x = inputs[name]
        return inputs | {name: (x * self._along(self.ia3_l.flatten())).to(x.dtype)}

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = tensors["weight"]
        factor = self.ia3_l.detach().flatten().to(weight.dtype)
        if self.spatial:  # a filter of group g sees the g-th share of the channels
            share = factor.unflatten(0, (self.groups, -1)).repeat_interleave(weight.shape[0] // self.groups, 0)
            return tensors | {"weight": weight * share.reshape(*share.shape, *(1,) * self.spatial)}
        return tensors | {"weight": weight * (factor[:, None] if self.transposed else factor)}


def _spatial(module: nn.Module) -> int:
    """How many dimensions a convolution slides over; 0 for a linear map."""
    return len(module.kernel_size) if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 0
