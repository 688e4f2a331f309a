r"""BitFit: y = f(x) + (b' − b), with a frozen bias b of the base and its trained copy b'.

::

    x ──── W, b (frozen) ────(+)──── y          b' (out,), starts as b
                              │
                          (b' − b)

Source: Ben Zaken et al., arXiv 2106.10199 §2: every bias, including those of norms, and the task head. Reduced (§4):
the biases of the queries and of the first feed-forward map. Models without biases (T5, Llama) get zero biases, as in
the BitFit on T5 in Ladder Side-Tuning's repository.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from byway.core.copies import TrainedBias, tied_biases, untrained_biases
from byway.core.families import Facts, facts
from byway.core.families.facts import inside
from byway.core.fields import Layers, Names
from byway.core.method import Attached, BuildContext, Method, Placement, without_weight_decay
from byway.core.slots import SidePath, Site, base_modules
from byway.core.targets.resolve import resolve
from byway.core.weights import device_of, factor_dtype, features, is_conv, is_linear, is_norm
from byway.errors import NotMergeable, TargetError, listed

__all__ = ["AddedBias", "BitFit", "BlockBias"]


@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """The biases of linear maps, convolutions and norms, and the task head.

    Attaching leaves the output unchanged. Biases have no weight decay. BERT-base has 102,912 trainable parameters
    besides the head.

    Raises:
        ConfigError: a value that is not allowed.
        TargetError: something named is not in the model, or the model has no bias and `missing` is ``refuse``.
    """

    which: Names = "all"
    """Biases to train: ``all``, ``query_and_intermediate`` (of the queries and of the first map of each feed-forward
    sub-layer), or those of modules given by a regular expression or a list of names."""
    missing: Literal["add", "refuse"] = "add"
    """If none of the chosen modules has a bias: ``add`` zero biases to linear maps and norms (not to the head), or
    ``refuse``."""
    exclude: str | Sequence[str] | None = None
    """Modules to leave out: a regular expression, or a list of names."""
    layers: Layers | None = None
    """Layers to adapt, counted within each stack: indices, ranges such as ``16-``, or ``language-model``
    (those of a vision-language model's decoder); null: all."""

    mergeable: ClassVar[bool] = True
    merges_where: ClassVar[str] = "where the model has biases (T5 and Llama have none)"

    def plan(self, model: nn.Module) -> Placement:
        notes: list[str] = []
        there = facts(model)
        able = {path: module for path, module in base_modules(model) if path and _can_have_bias(module)}
        by_name = self.which not in ("all", _REDUCED)
        usual = _queries_and_intermediate(there) if self.which == _REDUCED else [p for p in able if not _read_directly(model, p)]
        chosen = resolve(
            model,
            self.which if by_name else None,
            exclude=self.exclude,
            layers=self.layers,
            accepts=_can_have_bias,
            usual=usual,
            notes=notes,
        )
        biased = [site for site in chosen if _has_bias(site.module)]
        if self.which == "all":
            notes.extend(untrained_biases(model))
        if biased:
            bare = [site.path for site in chosen if not _has_bias(site.module)]
            if by_name and bare:
                raise TargetError(f"which: {listed(bare, 3)} has no bias", "leave it out")
            # a bias that another module shares is one tensor: it is trained in both
            shared = tied_biases(model, {site.path for site in biased})
            return Placement(list({site.path: site for site in (*biased, *shared)}.values()), notes)
        if self.missing == "refuse":
            raise TargetError(f"{type(model).__name__} has no bias to train", "missing: add adds zero biases to its linear maps and norms")
        apart = tuple(head for head in (there.head, *there.task_heads) if head is not None)
        added = [site for site in chosen if by_name or not any(inside(site.path, head) for head in apart)]
        notes.append(f"{type(model).__name__} has no bias there: {len(added)} modules get a zero bias, which cannot be merged")
        return Placement(added, notes)

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        if not _has_bias(site.module):
            return AddedBias(site.module)
        if self.which == _REDUCED:
            runs = facts(model).projections("q").get(site.path)
            if runs is not None:
                return BlockBias(site.module, tuple(row for start, stop in runs for row in range(start, stop)))
        return TrainedBias(site.module, adapted=False, shared=context.shared)

    def param_groups(self, adapter: Attached, learning_rate: float) -> list[dict[str, Any]]:
        """Return groups without weight decay for the biases."""
        return without_weight_decay(adapter, learning_rate, TrainedBias, AddedBias)


_REDUCED = "query_and_intermediate"


def _can_have_bias(module: nn.Module) -> bool:
    """True if the module adds its bias last, if it has one, so that b' − b can be added to its output."""
    return is_linear(module) or is_conv(module) or is_norm(module)


def _has_bias(module: nn.Module) -> bool:
    return isinstance(module._parameters.get("bias"), Tensor)


def _read_directly(model: nn.Module, path: str) -> bool:
    """True if the module is part of an ``nn.MultiheadAttention``, which reads its tensors and never calls it."""
    return isinstance(model.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention)


def _queries_and_intermediate(facts: Facts) -> list[str]:
    """Return the maps that compute queries, and those of the feed-forward parts except the last."""
    outputs = set(facts.feed_forward_outputs)
    first = [path for path in facts.feed_forward_linears if path not in outputs]
    queries = list(facts.projections("q"))
    if not queries or not first:
        raise TargetError("the maps of the queries and the first feed-forward maps cannot be told", "name them in `which`")
    return [*queries, *first]


class BlockBias(TrainedBias):
    """y = f(x) + (b' − b) on k output features of a fused map (its queries); b' (k,)."""

    def __init__(self, module: nn.Module, rows: tuple[int, ...]) -> None:
        super().__init__(module, adapted=False)
        self.rows: Tensor
        self.register_buffer("rows", torch.tensor(rows, device=self.bias.device), persistent=False)
        self.bias = nn.Parameter(self.bias.detach()[self.rows].clone())

    def delta(self) -> Tensor:
        base = self.base.module.bias
        if not isinstance(base, Tensor):
            raise TypeError(f"{type(self.base.module).__name__} no longer has a bias")
        return torch.zeros_like(base, dtype=self.bias.dtype).index_copy(0, self.rows, self.bias - base[self.rows])


class AddedBias(SidePath):
    """y = f(x) + b' on a module without a bias; b' (out,) starts at zero."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        weight = module.weight
        width = weight.shape[-1] if is_norm(module) and isinstance(weight, Tensor) else features(module)[1]
        self.bias = nn.Parameter(torch.zeros(width, dtype=factor_dtype(module), device=device_of(module)))
        self.channels = (1,) * len(module.kernel_size) if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else ()

    def after(self, inputs: dict[str, Any], out: Tensor) -> Tensor:
        return out + self.bias.to(out.dtype).reshape(-1, *self.channels)

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        raise NotMergeable("the module has no bias to fold the added one into", "keep it as an adapter")
