r"""(IA)³: K ← l_k∘K, V ← l_v∘V, h ← l_ff∘h, with h the input of the last feed-forward matrix; every l starts at one.

::

    x ──── W_k, W_v (frozen) ────(×)──── k, v         h ────(×)──── W_2 (frozen) ──── y
                                  │                          │
                               l (out,)                   l (in,)

On a linear map, y = l∘(Wx + b) scales the output and y = W(l∘x) + b the input. There is no scale, no dropout and no
matrix product: it costs one multiplication and folds into the rows of W and b, or the columns of W.

Source: Liu et al., arXiv 2205.05638 §3.3 (T-Few). T-Few's code scales the output of ``wi_1``, which is equivalent:
h = act(wi_0 x)∘wi_1 x.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from byway.core.families import Facts, facts, inside, layer_index
from byway.core.families.facts import layer_above
from byway.core.fields import Layers, Names
from byway.core.method import Attached, BuildContext, Method, Placement, without_weight_decay
from byway.core.peft_format import PeftFormat
from byway.core.slots import SidePath, Site, base_modules
from byway.core.targets.resolve import resolve
from byway.core.targets.search import is_experts
from byway.core.weights import device_of, factor_dtype, features, is_conv, is_linear, is_transposed
from byway.errors import TargetError, listed

__all__ = ["IA3", "BlockScale", "InputScale", "OutputScale"]


class _IA3PeftFormat(PeftFormat["IA3"]):
    def fields(self, method: IA3) -> dict[str, Any]:
        return {"init_ia3_weights": True}

    def site_fields(self, method: IA3, installed: Sequence[tuple[Site, SidePath]], config: Mapping[str, Any]) -> dict[str, Any]:
        """Spell out ``feedforward_modules`` and the targets: peft's own tables differ from the paper's places."""
        chosen = [site.path for site, _ in installed]
        inputs = [site.path for site, side in installed if isinstance(side, InputScale)]
        names = sorted({path.rpartition(".")[2] for path in inputs})
        by_name = [path for path in chosen if path.endswith(tuple(names))] == inputs and set(names) <= set(config["target_modules"])
        fields = {
            "feedforward_modules": names if by_name else sorted(inputs),
            "fan_in_fan_out": any(is_transposed(site.module) for site, _ in installed),
        }
        # peft requires that each of them is literally among the targets
        return fields if by_name or not inputs else fields | {"target_modules": sorted({*config["target_modules"], *inputs})}

    def method(self, kind: type[IA3], config: Mapping[str, Any]) -> IA3:
        return kind(
            targets=config.get("target_modules"),
            feed_forward=config.get("feedforward_modules"),
            modules_to_save=tuple(config.get("modules_to_save") or ()) or "none",
        )


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Learned vectors that multiply keys, values and the hidden activations of the feed-forward part.

    Attaching leaves the output unchanged: every vector starts at one. The vectors have no weight decay, which would
    pull them to zero. Trainable parameters: d_k + d_v + d_ff per layer, and d_k + d_v more per cross-attention.

    Raises:
        ConfigError: an empty list of targets.
        TargetError: something named is not in the model or is not a linear map or convolution, or the places cannot be
            determined.
    """

    targets: Names | None = None
    """Modules to scale: a regular expression, or a list of names; null: the linear maps that compute keys and values,
    and the last linear map of each feed-forward sub-layer."""
    feed_forward: str | Sequence[str] | None = None
    """Modules among them that are scaled at their input; null: the last linear map of each feed-forward sub-layer. An
    empty list: none."""
    exclude: str | Sequence[str] | None = None
    """Modules to leave out, written like `targets`."""
    layers: Layers | None = None
    """Layers to adapt, counted within each stack: indices, ranges such as ``16-``, or ``language-model``
    (those of a vision-language model's decoder); null: all."""

    peft = _IA3PeftFormat("IA3")
    mergeable: ClassVar[bool] = True

    def plan(self, model: nn.Module) -> Placement:
        usual = None if self.targets is not None else self._usual(model)
        sites = resolve(model, self.targets, exclude=self.exclude, layers=self.layers, accepts=_scalable, usual=usual)
        if self.targets is None and self.feed_forward is None:
            return Placement(sites, _left_out(model))
        return Placement(sites)

    def _usual(self, model: nn.Module) -> list[str]:
        """Return the places of the paper: keys, values, and the last map of each feed-forward part."""
        there = facts(model)
        found = dict.fromkeys([*there.projections("k"), *there.projections("v")])
        if not found:
            raise TargetError(
                f"which linear maps of {type(model).__name__} compute keys and values cannot be told",
                "name them: targets=['k_proj', 'v_proj', 'down_proj'], feed_forward=['down_proj']",
            )
        return [*found, *self._at_input(model)]

    def _at_input(self, model: nn.Module) -> list[str]:
        """Return the paths of the modules that are scaled at their input, if they are targets."""
        if self.feed_forward is None:
            return list(facts(model).feed_forward_outputs)
        if not self.feed_forward:
            return []
        return [site.path for site in resolve(model, self.feed_forward, accepts=_scalable)]

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        at_input = context.shared.get(_AT_INPUT)
        if at_input is None:
            at_input = context.shared[_AT_INPUT] = frozenset(self._at_input(model))
            context.shared[_FACTS] = facts(model)
        if site.path in at_input:
            return InputScale(site.module)
        if self.targets is None:  # of a map that also computes queries, scale only the part of keys and values
            rows = _rows(context.shared[_FACTS], site.path)
            if rows is not None:
                return BlockScale(site.module, rows)
        return OutputScale(site.module)

    def param_groups(self, adapter: Attached, learning_rate: float) -> list[dict[str, Any]]:
        """Return groups without weight decay for the vectors, which it would pull to zero, not to one."""
        return without_weight_decay(adapter, learning_rate, _Scale)


def _left_out(model: nn.Module) -> list[str]:
    """Return notes on layers without vectors for keys and values, or for their feed-forward part, and the reasons."""
    there, modules = facts(model), dict(base_modules(model))
    layers = layer_index(there.stacks)

    def without(paths: Iterable[str]) -> list[str]:
        reached = {layer_above(path, layers) for path in paths}
        return [layer for layer in layers if layer not in reached]

    bare = without(there.feed_forward_outputs)
    experts = [layer for layer in bare if any(is_experts(path, module) for path, module in modules.items() if inside(path, layer))]
    others = [layer for layer in bare if layer not in experts]
    fused = without([*there.projections("k"), *there.projections("v")])
    of, how = f"of {len(layers)} layers", "cannot be told: name it with targets and feed_forward"
    notes = [f"keys and values only in {len(experts)} {of}, whose experts are 3-D parameters"] if experts else []
    notes += [f"keys and values only in {len(others)} {of} ({listed(others, 2)}), whose last feed-forward map {how}"] if others else []
    notes += [f"feed-forward part only in {len(fused)} {of} ({listed(fused, 2)}), whose map to keys and values {how}"] if fused else []
    return notes


_AT_INPUT, _FACTS = "ia3: scaled at their input", "ia3: facts"


def _scalable(module: nn.Module) -> bool:
    return is_linear(module) or is_conv(module)


def _rows(found: Facts, path: str) -> tuple[int, ...] | None:
    """Return the output features of a map that are keys or values; None: all of them."""
    runs = [found.projections(part).get(path) for part in ("k", "v")]
    if any(run is None for run in runs):
        return None
    return tuple(sorted(row for run in runs for start, stop in run or () for row in range(start, stop)))


class _Scale(SidePath):
    """A vector that starts at one, in float32 (float64 on a float64 base)."""

    peft_names = {"ia3_l": "ia3_l"}  # noqa: RUF012 - a constant of the class

    def __init__(self, module: nn.Module, *shape: int) -> None:
        super().__init__()
        self.ia3_l = nn.Parameter(torch.ones(shape, dtype=factor_dtype(module), device=device_of(module)))
        self.transposed = is_transposed(module)
        self.spatial = _spatial(module)

    def _along(self, vector: Tensor) -> Tensor:
        """Reshape `vector` to multiply the features of an activation: its last dimension, or a convolution's second."""
        return vector.reshape(-1, *(1,) * self.spatial)


class OutputScale(_Scale):
    """y = l∘f(x), l (out, 1), or (1, out, 1 …) for the channels of a convolution. W ← diag(l)·W, b ← l∘b."""

    def __init__(self, module: nn.Module) -> None:
        out, spatial = features(module)[1], _spatial(module)
        super().__init__(module, *((1, out, *(1,) * spatial) if spatial else (out, 1)))

    def factor(self) -> Tensor:
        """Return l as a vector over all output features."""
        return self.ia3_l.flatten()

    def after(self, inputs: dict[str, Any], out: Tensor) -> Tensor:
        # in float32 also on a bfloat16 base: bfloat16 has no value between 1 and 1.0078, so small changes would be lost
        return (out * self._along(self.factor())).to(out.dtype)

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = tensors["weight"]
        factor = self.factor().detach().to(weight.dtype)
        rows = factor if self.transposed else factor.reshape(-1, *(1,) * (weight.ndim - 1))
        return {name: tensor * (factor if name == "bias" else rows) for name, tensor in tensors.items()}


class BlockScale(OutputScale):
    """y = l∘f(x) on a fused map, with l trained for k output features (keys, values) and 1 for the others (queries).

    The parameter is (k, 1). Files hold (out, 1), with ones for the other features.
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
    """y = f(l∘x), l (1, in), or (1, in, 1 …) for a convolution. W ← W·diag(l), b is unchanged."""

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
        if self.spatial:  # a filter of group g reads the g-th part of the channels
            share = factor.unflatten(0, (self.groups, -1)).repeat_interleave(weight.shape[0] // self.groups, 0)
            return tensors | {"weight": weight * share.reshape(*share.shape, *(1,) * self.spatial)}
        return tensors | {"weight": weight * (factor[:, None] if self.transposed else factor)}


def _spatial(module: nn.Module) -> int:
    """Return the number of spatial dimensions of a convolution; 0 for a linear map."""
    return len(module.kernel_size) if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 0
