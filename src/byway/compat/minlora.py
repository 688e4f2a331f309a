"""minLoRA's interface: replace ``from minlora import ...`` by ``from byway.compat.minlora import ...``.

An update is a parametrization of a weight: W + s·BA, s = lora_alpha/rank. Every forward recomputes it, which takes the
memory of ΔW and of its gradient. Dropout is one mask over the input features for the whole batch. Tensor names
(``parametrizations.weight.0.lora_A``), initialization and defaults are minLoRA's. The differences:

* ``merge_lora`` and ``remove_lora`` work on torch 2.13 (minLoRA's raise there), for one copy of a model at a time.
  Merging ignores dropout. Parametrizations of other libraries are left alone.
* ``add_lora_by_name`` gives each layer one update, even if the names of its parents match too.
* ``load_multiple_lora`` refuses a state dict with missing or unexpected tensors.

New code should use ``byway.attach(model, byway.LoRA(...))``, which leaves the weights as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from byway.errors import AdapterError, TargetError, listed

__all__ = [
    "LoRAParametrization", "add_lora", "add_lora_by_name", "apply_lora", "apply_to_lora", "default_lora_config", "disable_lora",
    "enable_lora", "get_bias_params", "get_lora_params", "get_lora_state_dict", "get_params_by_name", "load_multiple_lora",
    "merge_lora", "name_is_bias", "name_is_lora", "remove_lora", "select_lora", "tie_weights", "untie_weights",
]  # fmt: skip

Config = Mapping[type[nn.Module], Mapping[str, Callable[[Any], nn.Module]]]


class LoRAParametrization(nn.Module):
    """W ↦ W + s·BA, A (rank, fan_in), B (fan_out, rank); transposed, W + s·AB, with `fan_in_fan_out`.

    A is initialized like the weight of an ``nn.Linear`` (uniform, by its last dimension), B with zeros.
    """

    lora_dropout_mask: Tensor

    def __init__(
        self, fan_in: int, fan_out: int, fan_in_fan_out: bool = False, rank: int = 4, lora_dropout_p: float = 0.0, lora_alpha: float = 1
    ) -> None:
        super().__init__()
        self.fan_in_fan_out = fan_in_fan_out
        self.rank, self.lora_alpha = rank, lora_alpha
        self.scaling = lora_alpha / rank
        self.enabled = True
        self.lora_A = nn.Parameter(torch.zeros(self.swap((rank, fan_in))))
        self.lora_B = nn.Parameter(torch.zeros(self.swap((fan_out, rank))))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.lora_dropout = nn.Dropout(lora_dropout_p) if lora_dropout_p > 0 else nn.Identity()
        self.register_buffer("lora_dropout_mask", torch.ones(self.swap((1, fan_in))))
        self.lora_As: list[nn.Parameter] = []
        self.lora_Bs: list[nn.Parameter] = []

    def swap(self, pair: tuple[Any, Any]) -> tuple[Any, Any]:
        """Return `pair`, reversed if the weight is stored as (fan_in, fan_out)."""
        return (pair[1], pair[0]) if self.fan_in_fan_out else pair

    def forward(self, X: Tensor) -> Tensor:
        if not self.enabled:
            return X
        left, right = self.swap((self.lora_B, self.lora_A * self.lora_dropout(self.lora_dropout_mask)))
        return X + (left @ right).view(X.shape) * self.scaling

    def disable_lora(self) -> None:
        """Return the plain weight from :meth:`forward` until :meth:`enable_lora` is called."""
        self.enabled = False

    def enable_lora(self) -> None:
        """Undo :meth:`disable_lora`."""
        self.enabled = True

    @classmethod
    def from_linear(cls, layer: nn.Module, rank: int = 4, lora_dropout_p: float = 0.0, lora_alpha: float = 1) -> LoRAParametrization:
        """Parametrize a weight (out, in), or (out, in, k, k) viewed as (out, in·k·k)."""
        fan_out, fan_in = _weight(layer, 2).flatten(1).shape
        return cls(fan_in, fan_out, False, rank, lora_dropout_p, lora_alpha)

    from_conv2d = from_linear

    @classmethod
    def from_embedding(cls, layer: nn.Module, rank: int = 4, lora_dropout_p: float = 0.0, lora_alpha: float = 1) -> LoRAParametrization:
        """Parametrize an embedding (entries, width): A (entries, rank), B (rank, width)."""
        fan_in, fan_out = _weight(layer, 2).shape
        return cls(fan_in, fan_out, True, rank, lora_dropout_p, lora_alpha)


def _weight(layer: nn.Module, dimensions: int = 0) -> Tensor:
    """Return the weight. Raises AdapterError, a ValueError, if it has fewer `dimensions`."""
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise TargetError(f"{type(layer).__name__} has no weight tensor")
    if weight.ndim < dimensions:
        what = f"the weight of {type(layer).__name__} has shape {tuple(weight.shape)}; a low-rank update needs a matrix"
        raise AdapterError(what, "leave this class out of lora_config")
    return weight


default_lora_config: Config = {nn.Linear: {"weight": partial(LoRAParametrization.from_linear, rank=4)}}
"""Module class (not its subclasses) → tensor name → constructor of the parametrization."""


def apply_lora(layer: nn.Module, register: bool = True, merge: bool = False, lora_config: Config = default_lora_config) -> None:
    """Parametrize one layer as `lora_config` says; with ``register=False`` remove its updates, merged or not.

    Raises:
        AdapterError: another library has parametrized the same tensor: its parametrization would be removed too.
    """
    if register:
        # torch gives a parametrized layer a class of its own, derived from the original one
        kind = type(layer).__bases__[0] if parametrize.is_parametrized(layer) else type(layer)
        for tensor, make in lora_config.get(kind, {}).items():
            parametrize.register_parametrization(layer, tensor, make(layer).to(_weight(layer).device))
        return
    if not parametrize.is_parametrized(layer):
        return
    lists = {name: list(chain) for name, chain in layer.parametrizations.items()}  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    for tensor, chain in lists.items():
        ours = [link for link in chain if isinstance(link, LoRAParametrization)]
        if not ours:
            continue
        if len(ours) < len(chain):
            raise AdapterError(f"{tensor} of a {type(layer).__name__} has parametrizations other than LoRA: they would be removed too")
        for link in ours:
            link.eval()  # a merge in training mode would keep one random dropout mask
        # removal deletes the tensor's property from the layer's class, which deep copies of the layer share
        kind = type(layer)
        own = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
        layer.__class__ = type(kind.__name__, kind.__bases__, own)  # pyright: ignore[reportAttributeAccessIssue]
        parametrize.remove_parametrizations(layer, tensor, leave_parametrized=merge)


def add_lora(model: nn.Module, lora_config: Config = default_lora_config) -> None:
    """Parametrize every layer of the classes in `lora_config`. A second call adds a second update."""
    for layer in _layers(model):
        apply_lora(layer, lora_config=lora_config)


def add_lora_by_name(model: nn.Module, target_module_names: Sequence[str], lora_config: Config = default_lora_config) -> None:
    """Parametrize the layers inside modules whose name contains one of `target_module_names`, each layer once.

    Raises:
        TargetError: one of the names occurs in no module's name.
    """
    named = dict(model.named_modules())
    unmatched = [target for target in target_module_names if not any(target in name for name in named)]
    if unmatched:
        names = listed(name.rpartition(".")[2] for name in named if name)
        raise TargetError(f"no module's name contains {listed(unmatched)}", f"there are: {names}")
    chosen = {
        id(layer): layer for name, module in named.items() if any(t in name for t in target_module_names) for layer in _layers(module)
    }
    for layer in chosen.values():
        apply_lora(layer, lora_config=lora_config)


def _layers(model: nn.Module) -> list[nn.Module]:
    """Return every module that is not part of a parametrization; a list, since the caller adds parametrizations."""
    inside = {id(part) for module in model.modules() if isinstance(module, parametrize.ParametrizationList) for part in module.modules()}
    return [module for module in model.modules() if id(module) not in inside]


def merge_lora(model: nn.Module) -> None:
    """Set W ← W + s·BA everywhere and remove the parametrizations."""
    for layer in _layers(model):
        apply_lora(layer, register=False, merge=True)


def remove_lora(model: nn.Module) -> None:
    """Remove the parametrizations; the weights are the original ones, bit for bit."""
    for layer in _layers(model):
        apply_lora(layer, register=False, merge=False)


def apply_to_lora(fn: Callable[[LoRAParametrization], Any]) -> Callable[[nn.Module], None]:
    """Return a function for ``model.apply`` that calls `fn` on LoRA parametrizations only."""

    def apply_fn(layer: nn.Module) -> None:
        if isinstance(layer, LoRAParametrization):
            fn(layer)

    return apply_fn


def enable_lora(model: nn.Module) -> nn.Module:
    """Undo :func:`disable_lora`."""
    return model.apply(apply_to_lora(LoRAParametrization.enable_lora))


def disable_lora(model: nn.Module) -> nn.Module:
    """Switch the updates off without removing them."""
    return model.apply(apply_to_lora(LoRAParametrization.disable_lora))


def name_is_lora(name: str) -> bool:
    """True if `name` is the name of a factor."""
    parts = name.split(".")
    return len(parts) >= 4 and parts[-4] == "parametrizations" and parts[-1] in ("lora_A", "lora_B")


def name_is_bias(name: str) -> bool:
    """True if `name` is the name of a bias."""
    return name.rpartition(".")[2] == "bias"


def get_params_by_name(
    model: nn.Module, print_shapes: bool = False, name_filter: Callable[[str], bool] | None = None
) -> Iterator[nn.Parameter]:
    """Yield the parameters whose name satisfies `name_filter`."""
    for name, parameter in model.named_parameters():
        if name_filter is None or name_filter(name):
            if print_shapes:
                print(name, parameter.shape)
            yield parameter


def get_lora_params(model: nn.Module, print_shapes: bool = False) -> Iterator[nn.Parameter]:
    """Yield the factors, for an optimizer."""
    return get_params_by_name(model, print_shapes, name_is_lora)


def get_bias_params(model: nn.Module, print_shapes: bool = False) -> Iterator[nn.Parameter]:
    """Yield the biases, for an optimizer."""
    return get_params_by_name(model, print_shapes, name_is_bias)


def get_lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the factors by their names in the model."""
    return {name: tensor for name, tensor in model.state_dict().items() if name_is_lora(name)}


def load_multiple_lora(model: nn.Module, lora_state_dicts: Sequence[Mapping[str, Tensor]]) -> nn.Module:
    """Load several sets of factors for :func:`select_lora` to choose from; the last one is active.

    Raises:
        AdapterError: a state dict has missing or unexpected tensors.
    """
    own = get_lora_state_dict(model)
    for index, state in enumerate(lora_state_dicts):
        missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
        if missing or unexpected:
            raise AdapterError(
                f"state dict {index}: missing: {listed(missing, 5) or 'none'}; not in the model: {listed(unexpected, 5) or 'none'}"
            )
    layers = [module for module in model.modules() if isinstance(module, LoRAParametrization)]
    for layer in layers:
        layer.lora_As, layer.lora_Bs = [], []
    for state in lora_state_dicts:
        model.load_state_dict(dict(state), strict=False)
        for layer in layers:
            layer.lora_As.append(nn.Parameter(layer.lora_A.detach().clone()))
            layer.lora_Bs.append(nn.Parameter(layer.lora_B.detach().clone()))
    return model


def select_lora(model: nn.Module, index: int) -> nn.Module:
    """Activate set `index` of those loaded by :func:`load_multiple_lora`."""

    def select(module: LoRAParametrization) -> None:
        if not -len(module.lora_As) <= index < len(module.lora_As):
            raise AdapterError(f"there is no LoRA number {index}: {len(module.lora_As)} are loaded", "call load_multiple_lora first")
        device = module.lora_A.device
        module.lora_A, module.lora_B = module.lora_As[index], module.lora_Bs[index]
        module.to(device)  # the model may have moved since they were loaded

    return model.apply(apply_to_lora(select))


def tie_weights(linear: nn.Linear, embedding: nn.Embedding) -> None:
    """Share one weight and one update between a head (entries, width) and its embedding: A of one is B of the other."""
    (chain, head), (tied, table) = _lora_of(linear), _lora_of(embedding)
    tied.original = chain.original
    table.lora_A, table.lora_B = head.lora_B, head.lora_A


def untie_weights(linear: nn.Linear, embedding: nn.Embedding) -> None:
    """Give the embedding a weight and an update of its own again, with their current values."""
    chain, table = _lora_of(embedding)
    original = chain.original
    assert isinstance(original, nn.Parameter)
    chain.original = nn.Parameter(original.detach().clone(), requires_grad=original.requires_grad)
    table.lora_A, table.lora_B = nn.Parameter(table.lora_A.detach().clone()), nn.Parameter(table.lora_B.detach().clone())


def _lora_of(layer: nn.Module) -> tuple[parametrize.ParametrizationList, LoRAParametrization]:
    chain = layer.get_submodule("parametrizations.weight") if parametrize.is_parametrized(layer, "weight") else None
    if not isinstance(chain, parametrize.ParametrizationList):
        raise TargetError(f"this {type(layer).__name__} has no LoRA on its weight", "call add_lora with a lora_config that names its class")
    links = [link for link in chain if isinstance(link, LoRAParametrization)]
    if len(links) != 1:
        raise TargetError(f"this {type(layer).__name__} has {len(links)} LoRAs on its weight; tying needs exactly one")
    return chain, links[0]
