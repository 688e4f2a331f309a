"""Bottleneck adapters as files of the ``adapters`` library (AdapterHub, 1.3.0): it loads what is written here, and the other way round.

A directory: ``adapter_config.json`` (it has ``config``, and no ``peft_type``), ``adapter.safetensors``, and for a head that was trained too
``head_config.json`` and ``model_head.safetensors``. A tensor is called ``<place>.adapters.<name>.<tensor>``, for instance
``bert.encoder.layer.0.output.adapters.task.adapter_down.0.weight``, in the module names of checkpoints; the adapter's name is part of it.

Not held by that format, and so saved in Byway's own: trained layer norms, a norm on what the adapter reads, a parallel adapter that reads
what a pre-norm feed-forward reads (there the library's reads the residual), places left out other than by layers, other families.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from byway.core.copies import TrainedCopy
from byway.core.families import checkpoint_names, facts
from byway.core.families.sublayers import SubLayer, sublayers
from byway.core.method import Attached
from byway.core.slots import SidePath, base_state_dict
from byway.disk.files import atomic_directory, to_json, write_safetensors
from byway.errors import AdapterError
from byway.formats.directory import README, is_adapter_directory
from byway.formats.peft.config import CONFIG
from byway.formats.record import make_record
from byway.methods.bottleneck.places import Place, bottleneck_size
from byway.methods.bottleneck.sides import Bottleneck, Tap
from byway.methods.bottleneck_adapter import BottleneckAdapter
from byway.methods.parallel_adapter import ParallelAdapter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "ACTIVATION_NAMES", "HEAD_CONFIG", "HEAD_WEIGHTS", "INIT_NAMES", "NEUTRAL", "WEIGHTS", "declined", "expected", "head_name", "is_config",
    "prefix_of", "save_adapter", "used_layers",
]  # fmt: skip

WEIGHTS = "adapter.safetensors"
HEAD_CONFIG, HEAD_WEIGHTS = "head_config.json", "model_head.safetensors"
VERSION = "adapters.1.3.0"

_NAMES = {
    "down.weight": "adapter_down.0.weight",
    "down.bias": "adapter_down.0.bias",
    "up.weight": "adapter_up.weight",
    "up.bias": "adapter_up.bias",
    "norm.weight": "adapter_norm_after.weight",
    "norm.bias": "adapter_norm_after.bias",
    "scaling": "scaling",
}
"""Own tensor name → the library's."""

_PARENT = MappingProxyType({"attention": "", "cross-attention": "", "feed-forward": ""})
_IN_LAYER = MappingProxyType({"attention": "attention_adapters", "feed-forward": "output_adapters"})
_HOMES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        **dict.fromkeys(("bert", "roberta", "xlm-roberta", "t5", "mt5"), _PARENT),
        **dict.fromkeys(("gpt2", "llama", "mistral"), _IN_LAYER),
        "vit": MappingProxyType({"attention": "attention_adapters", "feed-forward": "output.output_adapters"}),
    }
)
"""``config.model_type`` → role → where the library keeps the adapter: below the layer, or (empty) beside what answers z."""

ACTIVATION_NAMES = MappingProxyType(
    {name: name for name in ("relu", "gelu", "silu", "swish", "tanh", "sigmoid")} | {"gelu_tanh": "gelu_new", "leaky_relu": "leakyrelu"}
)
INIT_NAMES = MappingProxyType({"zero": "mam_adapter", "houlsby": "houlsby", "bert": "bert"})

NEUTRAL: Mapping[str, Any] = MappingProxyType(
    {
        "adapter_residual_before_ln": False,
        "factorized_phm_W": True,
        "factorized_phm_rule": False,
        "hypercomplex_nonlinearity": "glorot-uniform",
        "init_weights_seed": None,
        "inv_adapter": None,
        "inv_adapter_reduction_factor": None,
        "learn_phm": True,
        "ln_before": False,
        "original_ln_after": True,
        "phm_bias": True,
        "phm_c_init": "normal",
        "phm_dim": 4,
        "phm_init_range": 0.0001,
        "phm_layer": False,
        "phm_rank": 1,
        "residual_before_ln": True,
        "shared_W_phm": False,
        "shared_phm_rule": True,
        "stochastic_depth": 0.0,
        "use_gating": False,
    }
)
"""Fields of the library's ``BnConfig`` that Byway has no equal for, at the values that change nothing."""


def is_config(config: Mapping[str, Any]) -> bool:
    """Whether an ``adapter_config.json`` is the library's, not peft's."""
    return "peft_type" not in config and "config" in config and ("model_class" in config or "model_type" in config)


def declined(adapter: Attached) -> str:
    """Why this format cannot hold `adapter` exactly; ``""`` where it can."""
    method, model = adapter.method, adapter.model
    if not isinstance(method, BottleneckAdapter | ParallelAdapter):
        return f"{type(method).__name__} is no bottleneck adapter"
    hung = adapter.side_paths()
    other = [type(side).__name__ for _, side in hung if not isinstance(side, Bottleneck | Tap | TrainedCopy)]
    if other:
        return f"it holds no {other[0]}"
    if facts(model).model_type not in _HOMES:
        return f"it is not known where the library keeps adapters of {facts(model).model_type!r} models"
    if method.layer_norm == "in":
        return "the library cannot write a norm on what the adapter reads"
    places = _places(adapter)
    if isinstance(method, ParallelAdapter) and any(p.part.norm is None and method.reads == "input" for p in places):
        return "the library's parallel adapter reads the residual stream"
    if {p.width for p in places} != {_width(model)}:
        return "the model's layers are of different widths"
    wanted = {part.output for part in sublayers(model) if part.role in _roles(method) and part.layer in _kept(model, places)}
    if {p.part.output for p in places} != wanted:
        return "it leaves places out other than by layers"
    outside = [site.path for site, side in hung if isinstance(side, TrainedCopy) and "." in site.path]
    return f"{outside[0]} is trained whole and is not a head at the model's root" if outside else ""


def save_adapter(adapter: Attached, directory: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """Write the adapter into `directory` itself; an adapter that is there is replaced in one step, anything else refused.

    Raises:
        AdapterError: a tensor is not finite, or `directory` holds something else.
    """
    model, hung = adapter.model, adapter.side_paths()
    tensors = expected(model, [(p, side) for p, side in _placed(adapter)], adapter.name)
    copies = {site.path: side for site, side in hung if isinstance(side, TrainedCopy)}
    head = _head(model, copies)
    broken = [key for key, tensor in (tensors | head).items() if not tensor.isfinite().all()]
    if broken:
        raise AdapterError(f"the adapter holds NaN or infinity, in {', '.join(broken[:10])}", "load an earlier checkpoint")
    metadata = make_record(model, tensors, list(copies), tokenizer)
    about = _about(model)
    with atomic_directory(directory, replace=is_adapter_directory) as new:
        (new / CONFIG).write_text(to_json(about | {"name": adapter.name, "config": _config(adapter)}), encoding="utf-8")
        write_safetensors(new / WEIGHTS, {key: tensor.detach() for key, tensor in tensors.items()}, metadata)
        if head:
            write_safetensors(new / HEAD_WEIGHTS, head, {"format": "pt"})
            labels = {"label2id": model.config.label2id, "num_labels": model.config.num_labels}  # pyright: ignore[reportAttributeAccessIssue]
            (new / HEAD_CONFIG).write_text(to_json(about | {"name": None, "config": None} | labels), encoding="utf-8")
        (new / README).write_text(_readme(adapter), encoding="utf-8")
    return directory


def _about(model: nn.Module) -> dict[str, Any]:
    config: Any = model.config  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "model_type": config.model_type,
        "hidden_size": _width(model),
        "model_class": type(model).__name__,
        "model_name": config._name_or_path or "",
        "version": VERSION,
    }


def _width(model: Any) -> int:
    return model.config.hidden_size


def _placed(adapter: Attached) -> Iterator[tuple[Place, Bottleneck]]:
    there = {site.path: side for site, side in adapter.side_paths() if isinstance(side, Bottleneck)}
    for site in adapter.method.sites(adapter.model):
        side = there.get(site.path)
        if isinstance(site, Place) and side is not None:
            yield site, side


def _places(adapter: Attached) -> list[Place]:
    return [place for place, _ in _placed(adapter)]


def _roles(method: BottleneckAdapter | ParallelAdapter) -> Sequence[str]:
    return method.roles if isinstance(method, BottleneckAdapter) else ("feed-forward",)


def _kept(model: nn.Module, places: Sequence[Place]) -> list[str]:
    used = {place.part.layer for place in places}
    return [layer for layers in facts(model).stacks.values() for layer in layers if layer in used]


def used_layers(model: nn.Module) -> list[str]:
    """All layers in the order in which the library counts them: one stack after the other."""
    return [layer for layers in facts(model).stacks.values() for layer in layers]


def expected(model: nn.Module, placed: Sequence[tuple[Place, Bottleneck]], name: str) -> dict[str, Tensor]:
    """Key in the file → the tensor of a side path, for an adapter that is called `name` there."""
    known = facts(model)
    homes = _HOMES.get(known.model_type)
    if homes is None:
        raise AdapterError(f"it is not known where the adapters library keeps adapters of {known.model_type!r} models")
    names = _layer_names(model, used_layers(model))
    found: dict[str, Tensor] = {}
    for place, side in placed:
        home = f"{names[place.part.layer]}{_home(homes, place.part)}"
        own = dict(side.named_parameters())
        found |= {f"{home}.adapters.{name}.{theirs}": own[ours] for ours, theirs in _NAMES.items() if ours in own}
    return found


def _home(homes: Mapping[str, str], part: SubLayer) -> str:
    if part.role not in homes:
        raise AdapterError(f"the adapters library has no place for an adapter after {part.role} in this family")
    return f".{homes[part.role]}" if homes[part.role] else part.output[len(part.layer) :].rpartition(".")[0]


def _layer_names(model: nn.Module, layers: Sequence[str]) -> dict[str, str]:
    """Layer path → its name in checkpoints, told from what the layer holds under the same name in both."""
    names = checkpoint_names(model)
    found: dict[str, str] = {}
    for layer in layers:
        inside = ((path[len(layer) :], name) for path, name in names.items() if path.startswith(f"{layer}.") and name is not None)
        found[layer] = next((name.removesuffix(rest) for rest, name in inside if name.endswith(rest)), layer)
    return found


def prefix_of(model: Any) -> str:
    """What the trunk is called inside a model with a head; files have it or not, depending on the class that was saved."""
    return f"{model.base_model_prefix}." if model.base_model_prefix else ""


def head_name(names: Mapping[str, str | None], key: str) -> str:
    """A state-dict key as checkpoints call it."""
    path, _, leaf = key.rpartition(".")
    return f"{names.get(path) or path}.{leaf}"


def _head(model: nn.Module, copies: Mapping[str, SidePath]) -> dict[str, Tensor]:
    """Everything outside the trunk, with the trained copies in it; nothing where no head was trained."""
    if not copies:
        return {}
    names = checkpoint_names(model)
    trunks = (prefix_of(model), *(f"{path.partition('.')[0]}." for path in facts(model).stack_modules.values()), "shared.")
    base = {key: tensor for key, tensor in base_state_dict(model).items() if not key.startswith(trunks)}
    trained = {f"{path}.{key}": t for path, side in copies.items() if isinstance(side, TrainedCopy) for key, t in side.export().items()}
    return {head_name(names, key): tensor.detach() for key, tensor in (base | trained).items()}


def _config(adapter: Attached) -> dict[str, Any]:
    """The library's ``BnConfig`` that builds exactly what hangs."""
    method, model = adapter.method, adapter.model
    assert isinstance(method, BottleneckAdapter | ParallelAdapter)
    roles, used = _roles(method), _kept(model, _places(adapter))
    holding = {part.layer for part in sublayers(model) if part.role in roles}
    sides = [side for _, side in _placed(adapter)]
    shape = sides[0].shape
    return {
        **NEUTRAL,
        "mh_adapter": "attention" in roles,
        "output_adapter": "feed-forward" in roles,
        "cross_adapter": "cross-attention" in roles,
        "is_parallel": isinstance(method, ParallelAdapter),
        "original_ln_before": isinstance(method, BottleneckAdapter) and method.variant == "pfeiffer",
        "ln_after": shape.layer_norm == "out",
        "non_linearity": ACTIVATION_NAMES[shape.activation],
        "init_weights": INIT_NAMES[shape.init],
        "scaling": shape.scaling if isinstance(shape.scaling, str) else float(shape.scaling),
        "dropout": shape.dropout,
        "reduction_factor": _reduction(shape.width, shape.size, method.reduction),
        "leave_out": [i for i, layer in enumerate(used_layers(model)) if layer in holding and layer not in used],
    }


def _reduction(width: int, size: int, wanted: float) -> float:
    """A factor that gives this size when the width is divided by it and rounded down."""
    for factor in (wanted, width / size):
        if bottleneck_size(width, factor, None) == size:
            return factor
    return width / (size + 0.5)


def _readme(adapter: Attached) -> str:
    return (
        f"# {type(adapter.method).__name__}\n\n{adapter.num_parameters:,} trained parameters for a {type(adapter.model).__name__}, "
        "in the format of the adapters library.\n\n"
        f"```python\nimport byway\nbyway.load(model, 'PATH')          # or, there: model.load_adapter('PATH', set_active=True)\n```\n"
    )
