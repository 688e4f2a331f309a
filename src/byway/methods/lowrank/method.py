"""What the methods with a low-rank update have in common (LoRA, DoRA): fields, targets, starts, HF peft's configuration."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from byway.core.copies import TrainedBias, TrainedRows, rows_of_tied, tied_to
from byway.core.fields import bias_problems, dropout_problems, finite, whole
from byway.core.method import BuildContext, Method
from byway.core.slots import SidePath, Site, base_modules
from byway.core.weights import is_conv, is_embedding, is_linear
from byway.errors import ConfigError, TargetError
from byway.methods.lowrank.initialization import INITS, Init, factors, matrix_sizes, subtracted
from byway.methods.lowrank.sides import LowRank
from byway.methods.lowrank.targeted import TargetedMethod

if TYPE_CHECKING:
    from byway.core.method import Attached
    from byway.methods.lowrank.eva import Directions

__all__ = ["LowRankMethod", "adaptable", "trained_biases"]

LARGEST_RANK = 65_536
"""Wider than any weight that is low-rank beside it; a larger number is a slip, found before a model is loaded."""

_OTHER_VARIANTS = (
    "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "layer_replication", "target_parameters",
    "monteclora_config", "kasa_config", "velora_config",
)  # fmt: skip
"""Fields of peft's LoraConfig that change what the tensors mean, beside ``use_dora``."""
_EVA = "eva"
"""Under which name what the data decided is kept between :meth:`prepare` and :meth:`build`."""


@dataclass(frozen=True, kw_only=True)
class LowRankMethod(TargetedMethod):
    """A low-rank update beside linear maps, embeddings and convolutions."""

    rank: int = 8
    """r: the rank of the update."""
    alpha: float = 16.0
    """The update is scaled by alpha/rank (alpha/√rank when rank-stabilized)."""
    dropout: float = 0.0
    """Dropout on the branch's input, in [0, 1)."""
    targets: str | Sequence[str] | None = None
    """``all-linear``, a role (``attention``, ``feed-forward``), a regular expression, or a list of names; none: by architecture."""
    exclude: str | Sequence[str] | None = None
    """Modules to leave out, written like `targets`."""
    layers: str | int | Sequence[int | str] | None = None
    """Layers to adapt, counted per stack: indices, or ranges such as ``16-``."""
    rank_pattern: Mapping[str, int] | None = None
    """Other ranks for modules whose path ends in a key (a regular expression)."""
    alpha_pattern: Mapping[str, float] | None = None
    """Other alphas, likewise."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base are trained too, beside the base: none, all, or those of the adapted modules."""
    init: Init = "kaiming"
    """How A and B start: ``kaiming`` and ``gaussian`` with B = 0; ``pissa`` (exact SVD) and ``pissa_fast`` (randomized) with W's top r;
    ``olora`` with W's QR; ``eva`` with the main directions of the inputs, which needs calibration batches."""
    rho: float = 2.0
    """How unevenly ``eva`` may spread the ranks: at most rho·rank in one module; 1 leaves them as they are."""
    rank_stabilized: bool = False
    """Scale by alpha/√rank, so that the update does not fade as the rank grows (rsLoRA)."""
    trained_tokens: Sequence[int] = ()
    """Rows of the input embedding (and of a head tied to it) that are trained whole: the ids of new tokens."""
    plus_ratio: float | None = None
    """LoRA+: B learns this many times faster than A."""

    elsewhere: ClassVar[dict[str, str]] = Method.elsewhere | {
        "r": "rank",
        "lora_r": "rank",
        "lora_rank": "rank",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "lora_target": "targets",
        "lora_target_modules": "targets",
        "lora_modules_to_save": "modules_to_save",
        "use_rslora": "rank_stabilized",
        "peft_use_rslora": "rank_stabilized",
        "loraplus_lr_ratio": "plus_ratio",
        "trainable_token_indices": "trained_tokens",
        "init_lora_weights": "init",
    }
    peft_type: ClassVar[str | None] = "LORA"
    mergeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = self._problems()
        if problems:
            raise ConfigError("; ".join(problems))

    def _problems(self) -> list[str]:
        """Everything that is wrong with the fields."""
        problems = [
            *(
                f"{what} is {r!r}; it must be a whole number from 1 to {LARGEST_RANK}"
                for what, r in self._ranks()
                if not whole(r) or not 1 <= r <= LARGEST_RANK
            ),
            *(f"{what} is {a!r}; it must be a positive number" for what, a in self._alphas() if not finite(a) or a <= 0),
        ]
        problems += dropout_problems(self.dropout)
        if self.plus_ratio is not None and (not finite(self.plus_ratio) or self.plus_ratio <= 0):
            problems.append(f"plus_ratio is {self.plus_ratio!r}; it must be a positive number")
        if self.init not in INITS:
            problems.append(f"init is {self.init!r}; it must be {', '.join(INITS[:-1])} or {INITS[-1]}")
        if not finite(self.rho) or self.rho < 1:
            problems.append(f"rho is {self.rho!r}; it must be a number of at least 1")
        return problems + bias_problems(self.bias)

    def _ranks(self) -> list[tuple[str, int]]:
        return [("rank", self.rank), *((f"rank_pattern[{k!r}]", v) for k, v in (self.rank_pattern or {}).items())]

    def _alphas(self) -> list[tuple[str, float]]:
        return [("alpha", self.alpha), *((f"alpha_pattern[{k!r}]", v) for k, v in (self.alpha_pattern or {}).items())]

    def chosen(self, model: nn.Module, notes: list[str]) -> tuple[list[Site], bool]:
        from byway.core.targets.resolve import resolve
        from byway.core.targets.search import ALL_LINEAR

        patterns = {"rank_pattern": self.rank_pattern or {}, "alpha_pattern": self.alpha_pattern or {}}
        found = resolve(model, self.targets, exclude=self.exclude, layers=self.layers, accepts=adaptable, patterns=patterns, notes=notes)
        return found, self.targets == ALL_LINEAR

    def too_narrow(self, site: Site) -> bool:
        return self.rank_at(site.path) > min(matrix_sizes(site.module))

    def rank_at(self, path: str) -> int:
        """The rank of the update at a module."""
        from byway.core.targets.resolve import pattern_value

        return pattern_value(path, self.rank_pattern or {}, self.rank)

    def alpha_at(self, path: str) -> float:
        """The alpha of the update at a module."""
        from byway.core.targets.resolve import pattern_value

        return pattern_value(path, self.alpha_pattern or {}, self.alpha)

    def scale(self, rank: int, alpha: float) -> float:
        """s: alpha/rank, or alpha/√rank when rank-stabilized."""
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def check(self, sites: Sequence[Site]) -> None:
        for site in sites:
            _check_rank(site, self.rank_at(site.path))

    def prepare(self, model: nn.Module, context: BuildContext) -> Method:
        """With ``eva`` the method whose targets and ranks are what the data decided; otherwise itself."""
        if self.init != "eva":
            return self
        from byway.methods.lowrank.eva import directions, redistribute

        if not context.batches:
            raise ConfigError(
                "init is eva, which starts from data, and there are no calibration batches",
                "byway.attach(model, method, batches=[...]) with batches as the model takes them, or another init",
            )
        sites = list(self.sites(model))
        self.check(sites)
        linear = [site for site in sites if is_linear(site.module)]
        if not linear:
            raise TargetError("init eva starts linear maps only, and none is adapted", "choose init: kaiming")
        ranks = {site.path: self.rank_at(site.path) for site in linear}
        most = {site.path: min(round(ranks[site.path] * self.rho), *matrix_sizes(site.module)) for site in linear}
        found = directions(model, linear, most, context.batches)
        _check_tokens(found, ranks)
        given = redistribute(found, ranks, most) if self.rho > 1 else ranks
        context.shared[_EVA] = {path: found[path].vectors[:rank] for path, rank in given.items()}
        return self._with_ranks(sites, ranks, given)

    def _with_ranks(self, sites: Sequence[Site], before: Mapping[str, int], after: Mapping[str, int]) -> Method:
        """The method with other ranks at the same scale; what gets no rank is no target any more."""
        kept = [site.path for site in sites if after.get(site.path, 1)]
        exactly = {path: "^" + path.replace(".", r"\.") for path in kept}
        ranks = {exactly[p]: after.get(p, self.rank_at(p)) for p in kept}
        alphas = {exactly[p]: self.alpha_at(p) for p in kept}
        for path, rank in after.items():
            if rank and rank != before[path]:
                alphas[exactly[path]] *= self.scale(before[path], 1.0) / self.scale(rank, 1.0)
        changed = {key: rank for key, rank in ranks.items() if rank != self.rank}
        moved = {key: alpha for key, alpha in alphas.items() if alpha != self.alpha}
        return replace(self, targets=tuple(kept), exclude=None, layers=None, rank_pattern=changed or None, alpha_pattern=moved or None)

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        side = self._side(site, self.rank_at(site.path), self.alpha_at(site.path), context)
        start: Tensor | None = context.shared.get(_EVA, {}).get(site.path)
        if start is not None:
            side.lora_A.data.copy_(start)
        return side

    def _side(self, site: Site, rank: int, alpha: float, context: BuildContext) -> LowRank:
        options: dict[str, Any] = {"alpha": alpha, "rank_stabilized": self.rank_stabilized, "dropout": self.dropout}
        a, b = factors(site, rank, self.init, self.scale(rank, alpha), context.generator)
        if subtracted(self.init):
            options["start"] = (a.clone(), b.clone())
        return self.side(site, a, b, options)

    @abstractmethod
    def side(self, site: Site, a: Tensor, b: Tensor, options: dict[str, Any]) -> LowRank:
        """The side path for this kind of module, from its factors."""

    def extras(self, model: nn.Module, context: BuildContext, planned: Sequence[Site]) -> Iterator[tuple[Site, SidePath]]:
        yield from trained_biases(model, self.bias, planned)
        if self.trained_tokens:
            yield from _token_rows(model, tuple(self.trained_tokens), {site.path for site in planned})

    def param_groups(self, adapter: Attached, learning_rate: float) -> list[dict[str, Any]]:
        """With `plus_ratio` λ: every B (an embedding's too) at λ·lr, everything else at lr."""
        if self.plus_ratio is None:
            return super().param_groups(adapter, learning_rate)
        fast = {id(side.lora_B) for _, side in adapter.side_paths() if isinstance(side, LowRank)}
        parameters = [p for _, p in adapter.named_parameters()]
        return [
            {"params": [p for p in parameters if id(p) not in fast], "lr": learning_rate},
            {"params": [p for p in parameters if id(p) in fast], "lr": self.plus_ratio * learning_rate},
        ]

    def to_peft(self) -> dict[str, Any]:
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "bias": self.bias,
            "use_rslora": self.rank_stabilized,
            "init_lora_weights": "gaussian" if self.init == "gaussian" else True,
            "rank_pattern": dict(self.rank_pattern or {}),
            "alpha_pattern": dict(self.alpha_pattern or {}),
            "trainable_token_indices": list(self.trained_tokens) or None,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our fields for what a peft configuration asks for; variants that mean something else are refused by name."""
        variants = [k for k in _OTHER_VARIANTS if config.get(k)]
        if variants:
            raise ConfigError(f"this adapter is not a plain {cls.__name__}: {', '.join(variants)} is set", "merge it with peft first")
        start = config.get("init_lora_weights", True)
        start = start.lower() if isinstance(start, str) else start  # as peft reads it
        if isinstance(start, str) and start not in _STARTS_OF_PEFT:
            raise ConfigError(
                f"its factors stand beside a base that peft changed when it began (init_lora_weights: {start}), which cannot be repeated",
                "save it with peft's path_initial_model_for_weight_conversion: that gives an ordinary LoRA",
            )
        tokens = config.get("trainable_token_indices") or ()
        return {
            "init": _STARTS_OF_PEFT.get(start, "kaiming"),
            "rank": config.get("r", 8),
            "alpha": float(config.get("lora_alpha", 8)),
            "dropout": float(config.get("lora_dropout", 0.0)),
            "targets": config.get("target_modules"),
            "rank_pattern": config.get("rank_pattern") or None,
            "alpha_pattern": config.get("alpha_pattern") or None,
            "bias": config.get("bias", "none"),
            "rank_stabilized": bool(config.get("use_rslora", False)),
            "trained_tokens": tuple(tokens) if not isinstance(tokens, Mapping) else tuple(next(iter(tokens.values()), ())),
            "modules_to_save": tuple(config.get("modules_to_save") or ()) or "none",
        }


_STARTS_OF_PEFT: Mapping[Any, Init] = {
    "gaussian": "gaussian", "eva": "kaiming", "orthogonal": "kaiming", "pissa": "pissa", "olora": "olora",
}  # fmt: skip
"""peft's starts by name: those that leave the base as it is, and those that change it by what its weights alone determine."""


def trained_biases(model: nn.Module, which: str, adapted: Sequence[Site]) -> Iterator[tuple[Site, SidePath]]:
    """The biases that are trained beside the base: of everything (``all``), of the adapted modules (``lora_only``), or none."""
    if which == "none":
        return
    paths = {site.path for site in adapted}
    for path, module in base_modules(model):
        if isinstance(module._parameters.get("bias"), Tensor) and (which == "all" or path in paths):
            yield Site(path, module), TrainedBias(module, adapted=path in paths)


def adaptable(module: nn.Module) -> bool:
    """Whether a matrix can be read off `module`: a linear map, an embedding or a convolution."""
    return is_linear(module) or is_embedding(module) or is_conv(module)


def _check_rank(site: Site, rank: int) -> None:
    inside, outside = matrix_sizes(site.module)
    groups = site.module.groups if isinstance(site.module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 1
    if rank % groups:
        raise TargetError(
            f"{site.path} has {groups} groups, which must divide the rank, {rank}", f"choose rank {groups * max(1, rank // groups)}"
        )
    if rank > min(inside, outside):
        raise TargetError(
            f"rank {rank} is more than {site.path} can use ({inside} in, {outside} out)", f"choose a rank of at most {min(inside, outside)}"
        )


def _check_tokens(found: Mapping[str, Directions], ranks: Mapping[str, int]) -> None:
    short = [path for path, rank in ranks.items() if found[path].vectors.shape[0] < rank]
    if short:
        there, tokens = found[short[0]].vectors.shape[0], found[short[0]].count
        raise ConfigError(
            f"init eva: the {tokens} tokens of the calibration batches give {short[0]} only {there} directions for rank {ranks[short[0]]}",
            "pass more batches, or lower the rank",
        )


def _token_rows(model: nn.Module, tokens: tuple[int, ...], adapted: set[str]) -> Iterator[tuple[Site, SidePath]]:
    embeddings = [(path, m) for path, m in base_modules(model) if isinstance(m, nn.Embedding)]
    if not embeddings:
        raise TargetError(f"trained_tokens: {type(model).__name__} has no embedding")
    # the vocabulary is the embedding with the most rows; positions and token types are far smaller
    path, module = max(embeddings, key=lambda found: found[1].num_embeddings)
    if len(set(tokens)) != len(tokens) or not all(0 <= t < module.num_embeddings for t in tokens):
        raise TargetError(f"trained_tokens must be different ids from 0 to {module.num_embeddings - 1}; they are {list(tokens)}")
    if path in adapted:
        raise TargetError(f"{path} is both a target and has trained_tokens", "choose one of the two")
    rows = TrainedRows(module, tokens)
    yield Site(path, module), rows
    for other, embedding, side in rows_of_tied(model, rows, tied_to(model, path)):
        yield Site(other, embedding), side
