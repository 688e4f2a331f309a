"""The base class of LoRA and DoRA: fields, targets, initialization."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Le
from torch import Tensor, nn

from byway.core.copies import TrainedBias, biases, tied_biases, untrained_biases
from byway.core.families import input_embedding
from byway.core.fields import Dropout, Layers, Positive, Rank, Token
from byway.core.method import Attached, BuildContext, Method
from byway.core.slots import SidePath, Site
from byway.core.targets.resolve import pattern_value, resolve
from byway.core.targets.search import ALL_LINEAR
from byway.core.token_rows import TrainedRows, frozen_head, trained_rows, vocabulary
from byway.core.weights import is_conv, is_embedding, is_linear
from byway.errors import ConfigError, TargetError
from byway.methods.lowrank.initialization import Init, factors, matrix_sizes, subtracted
from byway.methods.lowrank.sides import LowRank, divisor
from byway.methods.lowrank.targeted import TargetedMethod

__all__ = ["LowRankMethod", "TrainedBiases", "adaptable", "trained_biases"]

TrainedBiases = Literal["none", "all", "lora_only"]
"""The names are HF peft's."""

_EVA = "eva"
"""Key of the A matrices in ``context.shared``, computed by :meth:`LowRankMethod.prepare` and read by ``build``."""


@dataclass(frozen=True, kw_only=True)
class LowRankMethod(TargetedMethod):
    """A low-rank update next to linear maps, embeddings and convolutions."""

    rank: Rank = 8
    """r: the rank of the update."""
    alpha: Positive = 16.0
    """The update is scaled by alpha/rank (alpha/√rank if `rank_stabilized`)."""
    dropout: Dropout = 0.0
    """Dropout probability on the input of the update."""
    targets: str | Sequence[str] | None = None
    """Modules to adapt: ``all-linear``, a role (``attention``, ``feed-forward``), a regular expression, or a list of
    names; null: chosen by architecture."""
    exclude: str | Sequence[str] | None = None
    """Modules to leave out, written like `targets`."""
    layers: Layers | None = None
    """Layers to adapt, counted within each stack: indices, ranges such as ``16-``, or ``language-model``
    (those of a vision-language model's decoder); null: all."""
    rank_pattern: Mapping[str, Rank] | None = None
    """Ranks that differ from `rank`: regular expression for the end of a module's path → its rank."""
    alpha_pattern: Mapping[str, Positive] | None = None
    """Values that differ from `alpha`, written like `rank_pattern`."""
    bias: TrainedBiases = "none"
    """Biases of the base to train as well, as copies: none, all, or (``lora_only``) those of the adapted modules."""
    init: Init = "kaiming"
    """Initial values of A and B: ``kaiming`` and ``gaussian`` with B = 0; ``pissa`` (exact SVD) and ``pissa_fast``
    (randomized SVD) from the top r singular directions of W; ``olora`` from the QR decomposition of W; ``eva`` from the
    principal directions of the inputs (needs calibration batches)."""
    rho: Annotated[float, Ge(1), Le(1000)] = 2.0
    """With ``eva``: the rank of one module may grow to rho·rank, at the expense of others; 1 leaves all ranks as they
    are."""
    rank_stabilized: bool = False
    """Scale by alpha/√rank, so that the update does not shrink as the rank grows (rsLoRA)."""
    trained_tokens: Sequence[Token] | Mapping[str, Sequence[Token]] = ()
    """Token ids whose rows of the input embedding (and of a head tied to it) are trained in full, for instance those of
    new tokens; ``{NAME: ids}`` names the embedding or head: an untied head trains its rows only if it is named."""
    plus_ratio: Positive | None = None
    """LoRA+: the learning rate of B is this many times that of A."""

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
    mergeable: ClassVar[bool] = True

    def chosen(self, model: nn.Module, notes: list[str]) -> tuple[list[Site], bool]:
        patterns = {"rank_pattern": self.rank_pattern or {}, "alpha_pattern": self.alpha_pattern or {}}
        found = resolve(model, self.targets, exclude=self.exclude, layers=self.layers, accepts=adaptable, patterns=patterns, notes=notes)
        head = frozen_head(model, self.trained_tokens) if self.trained_tokens else None
        if head is not None:
            both = f"{{{input_embedding(model)}: [...], {head}: [...]}}"
            notes.append(f"trained_tokens: {head} is not tied to the embedding and keeps its rows; {both} trains both")
        if self.bias == "all":
            notes.extend(untrained_biases(model))
        return found, self.targets == ALL_LINEAR

    def too_narrow(self, site: Site) -> bool:
        return self.rank_at(site.path) > min(matrix_sizes(site.module))

    def rank_at(self, path: str) -> int:
        """Return the rank of the update at a module."""
        return pattern_value(path, self.rank_pattern or {}, self.rank)

    def alpha_at(self, path: str) -> float:
        """Return the alpha of the update at a module."""
        return pattern_value(path, self.alpha_pattern or {}, self.alpha)

    def scale(self, rank: int, alpha: float) -> float:
        """Return s = alpha/rank, or alpha/√rank if rank-stabilized."""
        return alpha / divisor(rank, self.rank_stabilized)

    def check(self, sites: Sequence[Site]) -> None:
        for site in sites:
            rank, (inside, outside) = self.rank_at(site.path), matrix_sizes(site.module)
            groups = site.module.groups if isinstance(site.module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 1
            if rank % groups:
                hint = f"choose rank {groups * max(1, rank // groups)}"
                raise TargetError(f"{site.path} has {groups} groups, which must divide the rank, {rank}", hint)
            if rank > min(inside, outside):
                hint = f"choose a rank of at most {min(inside, outside)}"
                raise TargetError(f"rank {rank} is more than {site.path} can use ({inside} in, {outside} out)", hint)

    def prepare(self, model: nn.Module, context: BuildContext) -> Method:
        """Return this method; with ``eva``, with the targets and ranks that follow from the calibration batches."""
        if self.init != "eva":
            return self
        from byway.methods.lowrank.eva import directions, redistribute

        if not context.batches:
            raise ConfigError(
                "init: eva initializes from data, and there are no calibration batches",
                "byway.attach(model, method, batches=[...]) with batches that the model accepts, or another init",
            )
        sites = self.plan(model).sites
        self.check(sites)
        linear = [site for site in sites if is_linear(site.module)]
        if not linear:
            raise TargetError("init: eva initializes linear maps only, and none is adapted", "choose init: kaiming")
        ranks = {site.path: self.rank_at(site.path) for site in linear}
        most = {site.path: min(round(ranks[site.path] * self.rho), *matrix_sizes(site.module)) for site in linear}
        found = directions(model, linear, most, context.batches)
        short = next((path for path, rank in ranks.items() if found[path].vectors.shape[0] < rank), None)
        if short is not None:
            there, tokens = found[short].vectors.shape[0], found[short].count
            raise ConfigError(
                f"init: eva: {short} has rank {ranks[short]}, but {tokens} tokens of the calibration batches give only {there} directions",
                "pass more batches, or lower the rank",
            )
        given = redistribute(found, ranks, most) if self.rho > 1 else ranks
        context.shared[_EVA] = {path: found[path].vectors[:rank] for path, rank in given.items()}
        return self._with_ranks(sites, ranks, given)

    def _with_ranks(self, sites: Sequence[Site], before: Mapping[str, int], after: Mapping[str, int]) -> Method:
        """Return the method with the ranks `after` at the same scale, without the targets whose rank is 0."""
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
        """Build the side path for this kind of module from its initial factors."""

    def extras(self, model: nn.Module, context: BuildContext, planned: Sequence[Site]) -> Iterator[tuple[Site, SidePath]]:
        adapted = {site.path for site in planned}
        # before the biases, which are added to the logits that rows give
        for site, side in trained_rows(model, self.trained_tokens):
            if site.path in adapted:
                raise TargetError(f"{site.path} is a target and has trained_tokens", "use one of the two")
            yield site, side
        yield from trained_biases(model, self.bias, planned, context)

    def with_token_rows(self, model: nn.Module, tokens: Sequence[int]) -> Method:
        given = trained_rows(model, self.trained_tokens)
        rows = {site.path: side.indices.tolist() for site, side in given if isinstance(side, TrainedRows)}
        rows |= {path: list(dict.fromkeys([*rows.get(path, ()), *tokens])) for path in vocabulary(model)}
        return replace(self, trained_tokens=rows)

    def param_groups(self, adapter: Attached, learning_rate: float) -> list[dict[str, Any]]:
        """Return LoRA+'s groups for `plus_ratio` λ: every B (an embedding's too) at λ·lr, everything else at lr."""
        if self.plus_ratio is None:
            return super().param_groups(adapter, learning_rate)
        fast = {id(side.lora_B) for _, side in adapter.side_paths() if isinstance(side, LowRank)}
        parameters = [p for _, p in adapter.named_parameters()]
        return [
            {"params": [p for p in parameters if id(p) not in fast], "lr": learning_rate},
            {"params": [p for p in parameters if id(p) in fast], "lr": self.plus_ratio * learning_rate},
        ]


def trained_biases(model: nn.Module, which: str, adapted: Sequence[Site], context: BuildContext) -> Iterator[tuple[Site, SidePath]]:
    """Yield trained copies of biases: of every module (``all``), of the adapted modules (``lora_only``), or none."""
    if which == "none":
        return
    paths = {site.path for site in adapted}
    for site in tied_biases(model, biases(model) if which == "all" else paths):
        yield site, TrainedBias(site.module, adapted=site.path in paths, shared=context.shared)


def adaptable(module: nn.Module) -> bool:
    """True if the weight of `module` can be read as a matrix: a linear map, an embedding or a convolution."""
    return is_linear(module) or is_embedding(module) or is_conv(module)
