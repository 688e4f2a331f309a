r"""BitFit: y = f(x) + (b' − b), where b is a frozen bias of the base and b' starts as b.

::

    x ──── W, b (frozen) ────(+)──── y          b' (out,), trained beside the module
                              │
                          (b' − b)

Source: Ben Zaken et al., arXiv 2106.10199 §2: every bias, those of the norms included, and the task head. Reduced (§4): the biases of the
queries and of the feed-forward part's first map. Models without any bias (T5, Llama) are given zero biases, as Ladder Side-Tuning's
repository does for its BitFit on T5.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from byway.core.copies import TrainedBias
from byway.core.method import BuildContext, Method
from byway.core.slots import SidePath, Site, base_modules
from byway.core.weights import device_of, features, is_conv, is_linear, is_norm
from byway.errors import ConfigError, NotMergeable, TargetError, listed

if TYPE_CHECKING:
    from byway.core.families import Facts
    from byway.core.method import Attached

__all__ = ["AddedBias", "BitFit", "BlockBias"]


@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """The biases of linear maps, convolutions and norms, and nothing else but the task head.

    Attaching leaves the output as it is. Weight decay is not applied to biases. BERT-base: 102,912 trained numbers beside the head.

    Raises:
        ConfigError: a value that is none of those allowed.
        TargetError: something named is not in the model, or the model has no bias and `missing` is ``refuse``.
    """

    which: str | Sequence[str] = "all"
    """``all``, ``query_and_intermediate`` (queries and the feed-forward part's first map), or modules, written like `targets`."""
    missing: Literal["add", "refuse"] = "add"
    """Where the chosen modules have no bias at all: ``add`` zero biases to linear maps and norms (not the head), or ``refuse``."""
    exclude: str | Sequence[str] | None = None
    """Modules to leave out, by name or regular expression."""
    layers: str | int | Sequence[int | str] | None = None
    """Layers to adapt, counted per stack: indices, or ranges such as ``16-``."""

    mergeable: ClassVar[bool] = True
    merges_where: ClassVar[str] = "where the model has biases (T5 and Llama have none)"

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if not self.which:
            problems.append(f"which is {self.which!r}; it must be all, query_and_intermediate, or names")
        if self.missing not in ("add", "refuse"):
            problems.append(f"missing is {self.missing!r}; it must be add or refuse")
        if problems:
            raise ConfigError("; ".join(problems))

    def sites(self, model: nn.Module) -> Iterator[Site]:
        yield from self._choose(model, [])

    def notes(self, model: nn.Module) -> tuple[str, ...]:
        notes: list[str] = []
        self._choose(model, notes)
        return tuple(notes)

    def _choose(self, model: nn.Module, notes: list[str]) -> list[Site]:
        """The sites; `notes` receives what was added and what was left out."""
        from byway.core.families import facts
        from byway.core.targets.resolve import resolve

        there = facts(model)
        able = {path: module for path, module in base_modules(model) if path and _can_have_bias(module)}
        by_name = self.which not in ("all", _REDUCED)
        usual = [p for p in able if not _read_directly(model, p)] if self.which == "all" else _queries_and_intermediate(there)
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
            notes.extend(_left_out(model, able))
        if biased:
            bare = [site.path for site in chosen if not _has_bias(site.module)]
            if by_name and bare:
                raise TargetError(f"which: {listed(bare, 3)} has no bias", "leave it out")
            return _once(biased)
        if self.missing == "refuse":
            raise TargetError(f"{type(model).__name__} has no bias to train", "missing: add gives its linear maps and norms zero biases")
        apart = tuple(head for head in (there.head, *there.task_heads) if head is not None)
        added = [site for site in chosen if by_name or not any(site.path == h or site.path.startswith(f"{h}.") for h in apart)]
        notes.append(f"{type(model).__name__} has no bias there: {len(added)} modules are given one, from zero; it cannot be merged")
        return added

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        if not _has_bias(site.module):
            return AddedBias(site.module)
        if self.which == _REDUCED:
            from byway.core.families import facts

            runs = facts(model).projections("q").get(site.path)
            if runs is not None:
                return BlockBias(site.module, tuple(row for start, stop in runs for row in range(start, stop)))
        return TrainedBias(site.module, adapted=False)

    def param_groups(self, adapter: Attached, learning_rate: float) -> list[dict[str, Any]]:
        """The biases without weight decay, then what is trained whole (heads)."""
        kinds = (TrainedBias, AddedBias)
        biases = {id(p) for _, side in adapter.side_paths() if isinstance(side, kinds) for p in side.parameters()}
        parameters = [p for _, p in adapter.named_parameters()]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if id(p) in biases], "lr": learning_rate, "weight_decay": 0.0},
            {"params": [p for p in parameters if id(p) not in biases], "lr": learning_rate},
        ]
        return [group for group in groups if group["params"]]


_REDUCED = "query_and_intermediate"


def _can_have_bias(module: nn.Module) -> bool:
    """Whether the module ends by adding its bias, if it has one, so that b' − b can be added to what comes out."""
    return is_linear(module) or is_conv(module) or is_norm(module)


def _has_bias(module: nn.Module) -> bool:
    return isinstance(module._parameters.get("bias"), Tensor)


def _read_directly(model: nn.Module, path: str) -> bool:
    """Whether the module is part of an ``nn.MultiheadAttention``, which reads its tensors and never calls it."""
    return isinstance(model.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention)


def _queries_and_intermediate(facts: Facts) -> list[str]:
    """The maps that give queries, and those of the feed-forward parts but the last."""
    outputs = set(facts.feed_forward_outputs)
    first = [path for path in facts.feed_forward_linears if path not in outputs]
    queries = list(facts.projections("q"))
    if not queries or not first:
        raise TargetError("which maps give queries, and which begin the feed-forward parts, cannot be told", "name them in `which`")
    return [*queries, *first]


def _once(sites: Sequence[Site]) -> list[Site]:
    """Each bias at one module only: two modules may have the very same tensor."""
    return list({id(site.module._parameters["bias"]): site for site in reversed(sites)}.values())[::-1]


def _left_out(model: nn.Module, able: dict[str, nn.Module]) -> list[str]:
    """A note on biases that are added somewhere inside a module (BEiT's positions, DeBERTa's q_bias), where no side path reaches them."""
    known = {id(module._parameters.get("bias")) for path, module in able.items() if not _read_directly(model, path)}
    inside = [
        f"{path}.{name}"
        for path, module in base_modules(model)
        for name, parameter in module._parameters.items()
        if parameter is not None and "bias" in name and id(parameter) not in known
    ]
    return [f"left out, since they are added inside their modules: {listed(inside, 3)}"] if inside else []


class BlockBias(TrainedBias):
    """y = f(x) + (b' − b) on some output features of a fused map (its queries); b' (k,)."""

    def __init__(self, module: nn.Module, rows: tuple[int, ...]) -> None:
        super().__init__(module, adapted=False)
        self.rows: Tensor
        self.register_buffer("rows", torch.tensor(rows, device=self.bias.device), persistent=False)
        self.bias = nn.Parameter(self.bias.detach()[self.rows].clone())

    def delta(self) -> Tensor:
        base = self.base.module.bias
        if not isinstance(base, Tensor):
            raise TypeError(f"{type(self.base.module).__name__} has lost its bias")
        return torch.zeros_like(base, dtype=self.bias.dtype).index_copy(0, self.rows, self.bias - base[self.rows])


class AddedBias(SidePath):
    """y = f(x) + b', b' (out,) from zero, on a module that has no bias."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        weight = module.weight
        width = weight.shape[-1] if is_norm(module) and isinstance(weight, Tensor) else features(module)[1]
        dtype = torch.float64 if isinstance(weight, Tensor) and weight.dtype == torch.float64 else torch.float32
        self.bias = nn.Parameter(torch.zeros(width, dtype=dtype, device=device_of(module)))
        self.channels = (1,) * len(module.kernel_size) if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else ()

    def after(self, inputs: dict[str, Any], out: Tensor) -> Tensor:
        return out + self.bias.to(out.dtype).reshape(-1, *self.channels)

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        raise NotMergeable("the module has no bias that the added one could be folded into", "keep it as an adapter")
