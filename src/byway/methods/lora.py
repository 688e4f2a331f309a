r"""LoRA: y = Wx + s·B(A(drop(x))), s = alpha/rank (alpha/√rank when rank-stabilized).

::

    x ──┬──── W (frozen) ─────────(+)── y        A (r, in)    B (out, r)
        └─ drop ── A ── B ── ·s ───┘             ΔW = s·B·A   (out, in)

Source: Hu et al., arXiv 2106.09685 §4.1; rank-stabilized scale: Kalajdzievski, arXiv 2312.03732; LoRA+: Hayou et al., arXiv 2402.12354;
PiSSA: Meng et al., arXiv 2404.02948.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from byway.copies import TrainedBias, TrainedHeadRows, TrainedRows, tied_to
from byway.core import BuildContext, Method, SidePath, Site, base_modules
from byway.errors import ConfigError, TargetError
from byway.lowrank import BlockLoRA, ConvLoRA, EmbeddingLoRA, LinearLoRA, LowRank, Start, factor_dtype
from byway.weights import dense, device_of, features, is_conv, is_embedding, is_linear, is_transposed

if TYPE_CHECKING:
    from byway.core import Adapter

__all__ = ["LoRA"]

Init = Literal["kaiming", "gaussian", "pissa", "pissa_fast"]


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """A low-rank update beside linear maps, embeddings and convolutions.

    Attaching leaves the output as it is: B starts at zero (an embedding's A does; PiSSA's start is subtracted).
    Trained: rank·(in + out) numbers a module, plus what `bias`, `lora_bias`, `modules_to_save` and `trained_tokens` name.

    Raises:
        ConfigError: a value out of range.
        TargetError: something named is not in the model, or cannot take a low-rank update.
    """

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
    """How A and B start: ``kaiming`` and ``gaussian`` with B = 0; ``pissa`` (exact SVD) and ``pissa_fast`` (randomized) with W's top r."""
    rank_stabilized: bool = False
    """Scale by alpha/√rank, so that the update does not fade as the rank grows (rsLoRA)."""
    lora_bias: bool = False
    """B has a bias of its own."""
    blocks: Sequence[bool] | None = None
    """For fused maps (GPT-2's ``c_attn``): which of their equal output blocks are adapted, each with its own rank-r pair."""
    trained_tokens: Sequence[int] = ()
    """Rows of the input embedding (and of a head tied to it) that are trained whole: the ids of new tokens."""
    plus_ratio: float | None = None
    """LoRA+: B learns this many times faster than A."""

    peft_type: ClassVar[str | None] = "LORA"
    mergeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [
            *(
                f"{what} is {r!r}; it must be a whole number from 1 to {_LARGEST_RANK}"
                for what, r in self._ranks()
                if not _whole(r) or not 1 <= r <= _LARGEST_RANK
            ),
            *(f"{what} is {a!r}; it must be a positive number" for what, a in self._alphas() if not _finite(a) or a <= 0),
        ]
        if not _finite(self.dropout) or not 0 <= self.dropout < 1:
            problems.append(f"dropout is {self.dropout!r}; it must be at least 0 and below 1")
        if self.plus_ratio is not None and (not _finite(self.plus_ratio) or self.plus_ratio <= 0):
            problems.append(f"plus_ratio is {self.plus_ratio!r}; it must be a positive number")
        if self.init not in ("kaiming", "gaussian", "pissa", "pissa_fast"):
            problems.append(f"init is {self.init!r}; it must be kaiming, gaussian, pissa or pissa_fast")
        if self.bias not in ("none", "all", "lora_only"):
            problems.append(f"bias is {self.bias!r}; it must be none, all or lora_only")
        if self.blocks is not None and not any(self.blocks):
            problems.append(f"blocks is {self.blocks!r}; at least one block must be adapted")
        if self.blocks is not None and self.init != "kaiming":
            problems.append(f"blocks and init: {self.init} do not go together; a fused map starts from kaiming")
        if problems:
            raise ConfigError("; ".join(problems))

    def _ranks(self) -> list[tuple[str, int]]:
        return [("rank", self.rank), *((f"rank_pattern[{k!r}]", v) for k, v in (self.rank_pattern or {}).items())]

    def _alphas(self) -> list[tuple[str, float]]:
        return [("alpha", self.alpha), *((f"alpha_pattern[{k!r}]", v) for k, v in (self.alpha_pattern or {}).items())]

    def sites(self, model: nn.Module) -> Iterator[Site]:
        yield from self._resolve(model, [])

    def notes(self, model: nn.Module) -> tuple[str, ...]:
        notes: list[str] = []
        self._resolve(model, notes)
        return tuple(notes)

    def _resolve(self, model: nn.Module, notes: list[str]) -> list[Site]:
        from byway.targets import ALL_LINEAR, pattern_value, resolve

        patterns = {"rank_pattern": self.rank_pattern or {}, "alpha_pattern": self.alpha_pattern or {}}
        found = resolve(model, self.targets, exclude=self.exclude, layers=self.layers, accepts=_adaptable, patterns=patterns, notes=notes)
        if self.targets != ALL_LINEAR:
            return found
        # whoever asks for everything does not mean a gate with one output; a module asked for by name is refused instead
        narrow = [s.path for s in found if pattern_value(s.path, self.rank_pattern or {}, self.rank) > min(_sizes(s.module))]
        if narrow:
            notes.append(f"left out, narrower than the rank: {', '.join(narrow[:3])}{' …' if len(narrow) > 3 else ''}")
        return [site for site in found if site.path not in narrow]

    def check(self, sites: Sequence[Site]) -> None:
        from byway.targets import pattern_value

        for site in sites:
            _check_rank(site, pattern_value(site.path, self.rank_pattern or {}, self.rank))

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        from byway.targets import pattern_value

        rank = pattern_value(site.path, self.rank_pattern or {}, self.rank)
        alpha = pattern_value(site.path, self.alpha_pattern or {}, self.alpha)
        return self._side(site, rank, alpha, context.generator)

    def _side(self, site: Site, rank: int, alpha: float, generator: torch.Generator) -> LowRank:
        module = site.module
        options: dict[str, Any] = {"alpha": alpha, "rank_stabilized": self.rank_stabilized, "dropout": self.dropout, "bias": self.lora_bias}
        if self.blocks is not None:
            a, b = _block_factors(site, rank, self.blocks, generator)
            return BlockLoRA(module, a, b, blocks=tuple(self.blocks), **options)
        a, b = _factors(module, rank, self.init, generator)
        if self.init.startswith("pissa"):
            scale = alpha / (math.sqrt(rank) if self.rank_stabilized else rank)
            a, b = _principal(site, rank, scale, exact=self.init == "pissa", generator=generator)
            options["start"] = (a.clone(), b.clone())
        if isinstance(module, nn.Embedding):
            if self.lora_bias:
                raise TargetError(f"{site.path} is an embedding: its branch has no bias (lora_bias)", "exclude it, or leave lora_bias out")
            return EmbeddingLoRA(module, a, b, **options)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return ConvLoRA(module, a, b, **options)
        return LinearLoRA(module, a, b, **options)

    def extras(self, model: nn.Module, context: BuildContext, planned: Sequence[Site]) -> Iterator[tuple[Site, SidePath]]:
        adapted = {site.path for site in planned}
        if self.bias != "none":
            for path, module in base_modules(model):
                if isinstance(module._parameters.get("bias"), Tensor) and (self.bias == "all" or path in adapted):
                    yield Site(path, module), TrainedBias(module, adapted=path in adapted)
        if self.trained_tokens:
            yield from _token_rows(model, tuple(self.trained_tokens), adapted)

    def param_groups(self, adapter: Adapter, learning_rate: float) -> list[dict[str, Any]]:
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
            "lora_bias": self.lora_bias,
            "init_lora_weights": "gaussian" if self.init == "gaussian" else True,
            "rank_pattern": dict(self.rank_pattern or {}),
            "alpha_pattern": dict(self.alpha_pattern or {}),
            "trainable_token_indices": list(self.trained_tokens) or None,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> LoRA:
        """What a peft configuration asks for; fields of variants that are not plain LoRA are refused by name."""
        variants = [k for k in _OTHER_VARIANTS if config.get(k)]
        if variants:
            raise ConfigError(f"this adapter is not a plain LoRA: {', '.join(variants)} is set", "merge it with peft first")
        tokens = config.get("trainable_token_indices") or ()
        return cls(
            rank=config.get("r", 8),
            alpha=float(config.get("lora_alpha", 8)),
            dropout=float(config.get("lora_dropout", 0.0)),
            targets=config.get("target_modules"),
            rank_pattern=config.get("rank_pattern") or None,
            alpha_pattern=config.get("alpha_pattern") or None,
            bias=config.get("bias", "none"),
            rank_stabilized=bool(config.get("use_rslora", False)),
            lora_bias=bool(config.get("lora_bias", False)),
            trained_tokens=tuple(tokens) if not isinstance(tokens, Mapping) else tuple(next(iter(tokens.values()), ())),
            modules_to_save=tuple(config.get("modules_to_save") or ()) or "none",
        )


_LARGEST_RANK = 65_536
"""Wider than any weight that is low-rank beside it; a larger number is a slip, found before a model is loaded."""

_OTHER_VARIANTS = (
    "use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "layer_replication", "target_parameters",
    "monteclora_config", "kasa_config", "velora_config",
)  # fmt: skip
"""Fields of peft's LoraConfig that change what the tensors mean."""


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _adaptable(module: nn.Module) -> bool:
    return is_linear(module) or is_embedding(module) or is_conv(module)


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(in, out) of the weight as a matrix; no update beside it can have a rank above the smaller."""
    inside, outside = features(module)
    return (inside * math.prod(module.kernel_size), outside) if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else (inside, outside)


def _check_rank(site: Site, rank: int) -> None:
    inside, outside = _sizes(site.module)
    groups = site.module.groups if isinstance(site.module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 1
    if rank % groups:
        raise TargetError(
            f"{site.path} has {groups} groups, which must divide the rank, {rank}", f"choose rank {groups * max(1, rank // groups)}"
        )
    if rank > min(inside, outside):
        raise TargetError(
            f"rank {rank} is more than {site.path} can use ({inside} in, {outside} out)", f"choose a rank of at most {min(inside, outside)}"
        )


def _factors(module: nn.Module, rank: int, init: Init, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A and B at their start: U(±1/√fan_in) or N(0, 1/r) and zero; for an embedding zero and N(0, 1)."""
    dtype, device = factor_dtype(module), device_of(module)
    inside, outside = features(module)
    if isinstance(module, nn.Embedding):
        normal = torch.randn(outside, rank, dtype=dtype, generator=generator)
        return torch.zeros(rank, inside, dtype=dtype, device=device), normal.to(device)
    kernel: tuple[int, ...] = ()
    groups = 1
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        kernel, groups = tuple(module.kernel_size), module.groups
    a = torch.empty(rank, inside, *kernel, dtype=dtype)
    if init == "gaussian":
        a.normal_(0.0, 1.0 / rank, generator=generator)
    else:
        bound = 1.0 / math.sqrt(inside * math.prod(kernel))
        a.uniform_(-bound, bound, generator=generator)
    b = torch.zeros(outside, rank // groups, *(1,) * len(kernel), dtype=dtype, device=device)
    return a.to(device), b


def _block_factors(site: Site, rank: int, blocks: Sequence[bool], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    module = site.module
    if not is_linear(module):
        raise TargetError(f"{site.path} is a {type(module).__name__}: only a fused linear map has blocks")
    inside, outside = features(module)
    if outside % len(blocks):
        raise TargetError(
            f"{site.path} has {outside} outputs, which {len(blocks)} blocks do not divide", "give one flag for each fused map"
        )
    enabled = sum(blocks)
    dtype, device = factor_dtype(module), device_of(module)
    bound = 1.0 / math.sqrt(inside)
    a = torch.empty(rank * enabled, inside, dtype=dtype).uniform_(-bound, bound, generator=generator)
    return a.to(device), torch.zeros(outside // len(blocks) * enabled, rank, dtype=dtype, device=device)


def _principal(site: Site, rank: int, scale: float, *, exact: bool, generator: torch.Generator) -> Start:
    """PiSSA: with W = U S Vᵀ, A = √(S_r/s)·V_rᵀ and B = U_r·√(S_r/s), so that s·BA holds W's r largest components."""
    module = site.module
    if not is_linear(module):
        raise TargetError(f"{site.path} is a {type(module).__name__}: PiSSA starts linear maps only", "exclude it, or choose init: kaiming")
    weight = dense(module).to(torch.promote_types(factor_dtype(module), torch.float32))
    weight = weight.T if is_transposed(module) else weight  # (out, in)
    if exact:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, vh = _randomized_svd(weight, rank, generator)
    root = torch.sqrt(s[:rank] / scale)
    return root[:, None] * vh[:rank], u[:, :rank] * root


def _randomized_svd(weight: Tensor, rank: int, generator: torch.Generator, rounds: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Top singular triplets by subspace iteration (Halko et al., arXiv 0909.4061, algorithm 4.4), oversampled by the rank."""
    width = min(2 * rank, *weight.shape)
    basis = torch.randn(weight.shape[1], width, dtype=weight.dtype, generator=generator).to(weight.device)
    basis = torch.linalg.qr(weight @ basis).Q
    for _ in range(rounds):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return basis @ u, s, vh


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
    everything = dict(base_modules(model))
    for other in tied_to(model, path):
        if is_linear(everything[other]):
            yield Site(other, everything[other]), TrainedHeadRows(rows)
