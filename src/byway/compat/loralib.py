"""loralib's interface: ``import byway.compat.loralib as lora`` in place of ``import loralib as lora``.

The layers are torch's with the update s·BA inside them, s = lora_alpha/r; parameters, state-dict keys, random starts and defaults are
loralib's. ``eval()`` merges the update into the weight and ``train()`` takes it out again, as there. What differs:

* Taking it out is exact: the weight as it was before is kept while merged, and put back. (loralib subtracts, which drifts.)
* Factors that are loaded while merged act at once; a *weight* loaded while merged is refused, since it may hold an update or not.
* ``Conv1d`` and ``Conv3d`` work, ``MergedLinear`` without an enabled block is a plain map. (There these raise in the forward.)

For new code there is ``byway.attach(model, byway.LoRA(...))``, which needs no other layers; ``byway.load_loralib`` reads loralib's files.
Source: Hu et al., arXiv 2106.09685 §4.1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byway.errors import ConfigError

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvLoRA",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergedLinear",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
]

Bias = Literal["none", "all", "lora_only"]


class LoRALayer(nn.Module, ABC):
    """What all layers share: rank, scale, dropout, and a weight that is merged in evaluation."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: float

    def _start(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool, a: Sequence[int], b: Sequence[int]) -> None:
        """After the layer itself is built: factors of the shapes `a` and `b` if r > 0, and a frozen weight."""
        if r < 0:
            raise ConfigError(f"r is {r}; it must be a whole number of at least 0 (0: no update)")
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        self.merge_weights = merge_weights
        self.merged = False
        self._kept: Tensor | None = None
        if r > 0:
            weight = self._owner().weight
            assert isinstance(weight, nn.Parameter)
            self.lora_A = nn.Parameter(weight.new_zeros(tuple(a)))
            self.lora_B = nn.Parameter(weight.new_zeros(tuple(b)))
            self.scaling = lora_alpha / r
            weight.requires_grad = False

    @property
    def updated(self) -> bool:
        """Whether there is an update at all."""
        return "lora_A" in self._parameters

    def _owner(self) -> nn.Module:
        """The module that holds the weight."""
        return self

    @abstractmethod
    def delta(self) -> Tensor:
        """s·BA in the layout of the weight."""

    def _reset_factors(self) -> None:
        """A as torch starts a linear map's weight, B at zero."""
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
            weight = self._owner().weight
            assert isinstance(weight, Tensor)
            self._kept = weight.detach().clone()
            weight.add_(self.delta())
        self.merged = True

    @torch.no_grad()
    def _unmerge(self) -> None:
        if self._kept is not None:
            weight = self._owner().weight
            assert isinstance(weight, Tensor)
            weight.copy_(self._kept)  # not minus the update: that would be off by a rounding, and wrong if the factors have changed
        self._kept = None
        self.merged = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self._kept is not None:
            self._kept = fn(self._kept)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = f"{prefix}weight" if self._owner() is self else f"{prefix}conv.weight"
        if self.merged and self.updated and own in state_dict:
            error_msgs.append(f"{own} is loaded while the update is merged into it: call train() first, then load, then eval()")
            return
        merged = self.merged
        if merged:
            self._unmerge()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if merged:
            self._merge()


class Embedding(LoRALayer, nn.Embedding):
    """y = E[i] + s·(B A[:, i]); A (r, entries) starts at zero, B (width, r) normal."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, r: int = 0, lora_alpha: float = 1, merge_weights: bool = True, **kwargs: Any
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        self._start(r, lora_alpha, 0.0, merge_weights, (r, num_embeddings), (embedding_dim, r))
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
    """y = Wx + b + s·B(A(drop(x))); with `fan_in_fan_out` the weight is kept as (in, out)."""

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
        self._start(r, lora_alpha, lora_dropout, merge_weights, *self._shapes(r))
        self.reset_parameters()
        if fan_in_fan_out:
            self.weight.data = self.weight.data.T.contiguous()

    def _shapes(self, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return (r, self.in_features), (self.out_features, r)

    def reset_parameters(self) -> None:
        nn.Linear.reset_parameters(self)
        self._reset_factors()

    def product(self) -> Tensor:
        """BA as (out, in)."""
        return self.lora_B @ self.lora_A

    def delta(self) -> Tensor:
        return self._turned(self.product()) * self.scaling

    def _turned(self, weight: Tensor) -> Tensor:
        return weight.T if self.fan_in_fan_out else weight

    def branch(self, x: Tensor) -> Tensor:
        """B(A(x))."""
        return x @ self.lora_A.T @ self.lora_B.T

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        out = F.linear(x, self._turned(self.weight), self.bias)
        if self.merged or not self.updated:
            return out
        return out + self.branch(self.lora_dropout(x)) * self.scaling


class MergedLinear(Linear):
    """A map that is several in one (QKV): each of the n equal blocks of outputs that `enable_lora` names has its own rank-r pair.

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

    def _start(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool, a: Sequence[int], b: Sequence[int]) -> None:
        enabled = any(self.enable_lora)
        super()._start(r if enabled else 0, lora_alpha, lora_dropout, merge_weights, a, b)
        self.r = r

    def _shapes(self, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
        enabled = sum(self.enable_lora)
        return (r * enabled, self.in_features), (self.out_features // len(self.enable_lora) * enabled, r)

    def product(self) -> Tensor:
        pairs = torch.bmm(self.lora_B.unflatten(0, (sum(self.enable_lora), -1)), self.lora_A.unflatten(0, (sum(self.enable_lora), -1)))
        blocks = iter(pairs)  # each (out/n, in)
        nothing = pairs.new_zeros(pairs.shape[1:])
        return torch.cat([next(blocks) if on else nothing for on in self.enable_lora])

    def branch(self, x: Tensor) -> Tensor:
        return x @ self.product().T


class ConvLoRA(LoRALayer):
    """y = conv(x; W + s·BA), BA seen in the shape of W; A (r·k, in·k), B (out/groups·k^(d−1), r·k) for d dimensions and kernel size k.

    The convolution itself is the child ``conv``. `lora_dropout` is accepted and has no effect, as in loralib.
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
            raise ConfigError(f"kernel_size is {kernel_size!r}; loralib's convolutions take one whole number")
        self.conv = conv_module(in_channels, out_channels, kernel_size, **kwargs)
        rows = out_channels // self.conv.groups * kernel_size ** (self.conv.weight.ndim - 3)
        self._start(r, lora_alpha, lora_dropout, merge_weights, (r * kernel_size, in_channels * kernel_size), (rows, r * kernel_size))
        self.reset_parameters()

    def _owner(self) -> nn.Module:
        return self.conv

    def reset_parameters(self) -> None:
        """The convolution as torch starts it, A likewise, B at zero."""
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
    """Freeze everything but what is called ``lora_…``; `bias`: ``none``, ``all``, or ``lora_only`` (biases of layers with an update)."""
    _check(bias)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name or (bias == "all" and "bias" in name)
    if bias == "lora_only":
        for module in model.modules():
            own = module._parameters.get("bias") if isinstance(module, LoRALayer) else None
            if own is not None:
                own.requires_grad = True


def lora_state_dict(model: nn.Module, bias: Bias = "none") -> dict[str, Tensor]:
    """The tensors called ``lora_…``, and the biases that `bias` names, by their names in the model."""
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
