"""loralib's interface: replace ``import loralib as lora`` by ``import byway.compat.loralib as lora``.

The layers are torch's with the update s·BA inside, s = lora_alpha/r. Parameters, state-dict keys, initialization and
defaults are loralib's. ``eval()`` merges the update into the weight and ``train()`` removes it. The differences:

* Unmerging is exact: the original weight is kept while merged, and restored. (loralib subtracts the update: it drifts.)
* Factors loaded while merged take effect at once. Loading a *weight* while merged is an error, since it may or may not
  contain an update.
* ``Conv1d``, ``Conv3d`` and ``MergedLinear`` without an enabled block work. (In loralib their forward raises.)

New code should use ``byway.attach(model, byway.LoRA(...))``, which needs no special layers; ``byway.load_loralib``
reads loralib's files. Source: Hu et al., arXiv 2106.09685 §4.1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byway.errors import ConfigError

__all__ = [
    "Conv1d", "Conv2d", "Conv3d", "ConvLoRA", "Embedding", "Linear", "LoRALayer", "MergedLinear", "lora_state_dict",
    "mark_only_lora_as_trainable",
]  # fmt: skip

Bias = Literal["none", "all", "lora_only"]


class LoRALayer(nn.Module, ABC):
    """Base class of all layers: rank, scale, dropout, and a weight that is merged in evaluation mode."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: float

    def _add_lora(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool, a: Sequence[int], b: Sequence[int]) -> None:
        """Add factors of the shapes `a` and `b`, unless A is empty, and freeze the weight. Call it on a built layer."""
        if r < 0:
            raise ConfigError(f"r is {r}; it must be an integer ≥ 0 (0: no update)")
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        self.merge_weights = merge_weights
        self.merged = False
        self._original: Tensor | None = None
        if a[0] > 0:
            self.lora_A = nn.Parameter(self._weight.new_zeros(tuple(a)))
            self.lora_B = nn.Parameter(self._weight.new_zeros(tuple(b)))
            self.scaling = lora_alpha / r
            self._weight.requires_grad = False

    @property
    def updated(self) -> bool:
        """True if the layer has an update."""
        return "lora_A" in self._parameters

    @property
    def _weight(self) -> nn.Parameter:
        """The weight that the update is added to."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    @abstractmethod
    def delta(self) -> Tensor:
        """Return s·BA in the layout of the weight."""

    def _reset_factors(self) -> None:
        """Initialize A like the weight of an ``nn.Linear``, and B with zeros."""
        if self.updated:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if self.merge_weights and self.merged == mode:
            self._unmerge() if mode else self._merge()
        return self

    @torch.no_grad()
    def _merge(self) -> None:
        if self.updated:
            self._original = self._weight.detach().clone()
            self._weight.add_(self.delta())
        self.merged = True

    @torch.no_grad()
    def _unmerge(self) -> None:
        if self._original is not None:
            self._weight.copy_(self._original)  # subtracting would round, and be wrong if the factors have changed
        self._original = None
        self.merged = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self._original is not None:
            self._original = fn(self._original)
        return self

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: Any, missing_keys: Any, unexpected_keys: Any, error_msgs: Any
    ) -> None:
        name = next(prefix + key for key, parameter in self.named_parameters() if parameter is self._weight)
        merged = self.merged
        if merged and self.updated and name in state_dict:
            error_msgs.append(f"{name} is loaded while the update is merged into it: call train() first, then load, then eval()")
            return
        if merged:
            self._unmerge()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if merged:
            self._merge()


class Embedding(LoRALayer, nn.Embedding):
    """y = E[i] + s·(B A[:, i]); A (r, entries) is initialized with zeros, B (width, r) from a normal distribution."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, r: int = 0, lora_alpha: float = 1, merge_weights: bool = True, **kwargs: Any
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        self._add_lora(r, lora_alpha, 0.0, merge_weights, (r, num_embeddings), (embedding_dim, r))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.Embedding.reset_parameters(self)
        if self.updated:
            nn.init.zeros_(self.lora_A)
            nn.init.normal_(self.lora_B)

    def delta(self) -> Tensor:
        return (self.lora_B @ self.lora_A).T * self.scaling

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        out = nn.Embedding.forward(self, x)
        if self.merged or not self.updated:
            return out
        rows = F.embedding(x, self.lora_A.T, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)
        return out + (rows @ self.lora_B.T) * self.scaling


class Linear(LoRALayer, nn.Linear):
    """y = Wx + b + s·B(A(dropout(x))), A (r, in), B (out, r); the weight is (in, out) with `fan_in_fan_out`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        self.fan_in_fan_out = fan_in_fan_out
        self._add_lora(r, lora_alpha, lora_dropout, merge_weights, *self._shapes(r))
        self.reset_parameters()
        if fan_in_fan_out:
            self.weight.data = self.weight.data.T.contiguous()

    def _shapes(self, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return (r, self.in_features), (self.out_features, r)

    def reset_parameters(self) -> None:
        nn.Linear.reset_parameters(self)
        self._reset_factors()

    def product(self) -> Tensor:
        """Return BA as (out, in)."""
        return self.lora_B @ self.lora_A

    def delta(self) -> Tensor:
        return self._transposed(self.product()) * self.scaling

    def _transposed(self, weight: Tensor) -> Tensor:
        return weight.T if self.fan_in_fan_out else weight

    def branch(self, x: Tensor) -> Tensor:
        """Return B(A(x))."""
        return x @ self.lora_A.T @ self.lora_B.T

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        out = F.linear(x, self._transposed(self.weight), self.bias)
        if self.merged or not self.updated:
            return out
        return out + self.branch(self.lora_dropout(x)) * self.scaling


class MergedLinear(Linear):
    """Several linear maps in one (QKV): `enable_lora` says which of the n equal output blocks have a rank-r update.

    A (r·k, in), B (k·out/n, r) for k enabled blocks.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        if not enable_lora or out_features % len(enable_lora):
            raise ConfigError(f"enable_lora has {len(enable_lora)} entries, which do not divide out_features, {out_features}")
        self.enable_lora = list(enable_lora)
        super().__init__(in_features, out_features, r, lora_alpha, lora_dropout, fan_in_fan_out, merge_weights, **kwargs)

    def _shapes(self, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
        enabled = sum(self.enable_lora)
        return (r * enabled, self.in_features), (self.out_features // len(self.enable_lora) * enabled, r)

    def product(self) -> Tensor:
        # the same grouped convolution as in loralib, so that merged weights agree bit for bit
        blocks = F.conv1d(self.lora_A[None], self.lora_B[..., None], groups=sum(self.enable_lora))[0]
        enabled = iter(blocks.chunk(sum(self.enable_lora)))  # each (out/n, in)
        nothing = blocks.new_zeros(self.out_features // len(self.enable_lora), self.in_features)
        return torch.cat([next(enabled) if on else nothing for on in self.enable_lora])

    def branch(self, x: Tensor) -> Tensor:
        return x @ self.product().T


class ConvLoRA(LoRALayer):
    """y = conv(x; W + s·BA), with BA in the shape of W.

    A (r·k, in·k), B (out/groups·k^(d-1), r·k) for d dimensions, kernel size k. The convolution is the child ``conv``.
    `lora_dropout` is accepted and has no effect, as in loralib.
    """

    def __init__(
        self,
        conv_module: type[nn.Conv1d | nn.Conv2d | nn.Conv3d],
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if not isinstance(kernel_size, int):
            raise ConfigError(f"kernel_size is {kernel_size!r}; loralib's convolutions take a single integer")
        self.conv = conv_module(in_channels, out_channels, kernel_size, **kwargs)
        rows = out_channels // self.conv.groups * kernel_size ** (self.conv.weight.ndim - 3)
        self._add_lora(r, lora_alpha, lora_dropout, merge_weights, (r * kernel_size, in_channels * kernel_size), (rows, r * kernel_size))
        self.reset_parameters()

    @property
    def _weight(self) -> nn.Parameter:
        assert isinstance(self.conv.weight, nn.Parameter)
        return self.conv.weight

    def reset_parameters(self) -> None:
        """Initialize the convolution as torch does, A in the same way, and B with zeros."""
        self.conv.reset_parameters()
        self._reset_factors()

    def delta(self) -> Tensor:
        return (self.lora_B @ self.lora_A).view(self.conv.weight.shape) * self.scaling

    def forward(self, x: Tensor) -> Tensor:
        if self.merged or not self.updated:
            return self.conv(x)
        return self.conv._conv_forward(x, self.conv.weight + self.delta(), self.conv.bias)


class Conv1d(ConvLoRA):
    """A 1-dimensional convolution with an update."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv1d, *args, **kwargs)


class Conv2d(ConvLoRA):
    """A 2-dimensional convolution with an update; its factors have loralib's shapes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv2d, *args, **kwargs)


class Conv3d(ConvLoRA):
    """A 3-dimensional convolution with an update."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv3d, *args, **kwargs)


def mark_only_lora_as_trainable(model: nn.Module, bias: Bias = "none") -> None:
    """Freeze everything but the parameters named ``lora_…`` and the biases that `bias` selects.

    bias: ``none``, ``all``, or ``lora_only`` (the biases of layers of this module).
    """
    _check(bias)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name or (bias == "all" and "bias" in name)
    if bias == "lora_only":
        for module in model.modules():
            own = module._parameters.get("bias") if isinstance(module, LoRALayer) else None
            if own is not None:
                own.requires_grad = True


def lora_state_dict(model: nn.Module, bias: Bias = "none") -> dict[str, Tensor]:
    """Return the tensors named ``lora_…`` and the biases that `bias` selects, by their names in the model."""
    _check(bias)
    everything = model.state_dict()
    own = {key for key in everything if "lora_" in key}
    if bias == "all":
        own |= {key for key in everything if "bias" in key}
    elif bias == "lora_only":
        own |= {f"{key.split('lora_')[0]}bias" for key in own} & everything.keys()
    return {key: value for key, value in everything.items() if key in own}


def _check(bias: str) -> None:
    if bias not in ("none", "all", "lora_only"):
        raise ConfigError(f"bias is {bias!r}; it must be none, all or lora_only")
