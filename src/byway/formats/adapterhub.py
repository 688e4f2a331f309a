"""Bottleneck adapters as files of the ``adapters`` library (AdapterHub, 1.3.0), for exchange in both directions.

A directory: ``adapter_config.json`` (with ``config``, and without ``peft_type``), ``adapter.safetensors``, and for a
head that was trained too ``head_config.json`` and ``model_head.safetensors``. A tensor is called
``<place>.adapters.<name>.<tensor>``, in the module names of checkpoints; the adapter's name is part of it, for
instance ``bert.encoder.layer.0.output.adapters.task.adapter_down.0.weight``.

The format does not hold trained layer norms, a norm on the adapter's input, a parallel adapter that reads what a
pre-norm feed-forward reads (the library's reads the residual), places left out other than by layers, or other
families: these are saved in Byway's own format. Loading checks everything before the model is touched, and every
tensor must be used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from byway.core.attach import planned
from byway.core.copies import TrainedCopy
from byway.core.disk.files import read_json, read_safetensors, to_json
from byway.core.families import checkpoint_names, facts
from byway.core.families.sublayers import sublayers
from byway.core.method import Attached, BuildContext, Method
from byway.core.slots import base_modules, base_state_dict
from byway.errors import AdapterError, listed, nearest
from byway.formats.directory import README, write
from byway.formats.format import Format, Loaded, LoadOptions
from byway.formats.record import check_base, check_tensors, errors_in, fill, make_record, most, read_record, read_weights
from byway.methods.bottleneck.places import Place, bottleneck_size
from byway.methods.bottleneck.sides import Bottleneck, Tap
from byway.methods.bottleneck_adapter import BottleneckAdapter, Where
from byway.methods.parallel_adapter import ParallelAdapter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["WEIGHTS", "AdapterHub", "is_config"]

VERSION = "adapters.1.3.0"
CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
HEAD_CONFIG, HEAD_WEIGHTS = "head_config.json", "model_head.safetensors"

_TENSOR_NAMES = {
    "down.weight": "adapter_down.0.weight", "down.bias": "adapter_down.0.bias", "up.weight": "adapter_up.weight",
    "up.bias": "adapter_up.bias", "norm.weight": "adapter_norm_after.weight", "norm.bias": "adapter_norm_after.bias",
    "scaling": "scaling",
}  # fmt: skip
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
"""``config.model_type`` → role → home of the adapter below the layer; if empty, it is at the sub-layer's output."""

_SWITCHES: Mapping[str, Where] = MappingProxyType(
    {"mh_adapter": "attention", "cross_adapter": "cross-attention", "output_adapter": "feed-forward"}
)
_ACTIVATIONS = MappingProxyType(
    {name: name for name in ("relu", "gelu", "silu", "swish", "tanh", "sigmoid")} | {"gelu_tanh": "gelu_new", "leaky_relu": "leakyrelu"}
)
_INITS = MappingProxyType({"zero": "mam_adapter", "houlsby": "houlsby", "bert": "bert"})

_KNOWN = (
    "mh_adapter", "output_adapter", "cross_adapter", "is_parallel", "original_ln_before", "ln_after", "non_linearity", "init_weights",
    "scaling", "dropout", "reduction_factor", "leave_out",
)  # fmt: skip
"""Fields of the library's ``BnConfig`` that Byway has an equal for."""
_UNUSED = {
    "factorized_phm_W": True, "factorized_phm_rule": False, "hypercomplex_nonlinearity": "glorot-uniform", "init_weights_seed": None,
    "inv_adapter_reduction_factor": None, "learn_phm": True, "phm_bias": True, "phm_c_init": "normal", "phm_dim": 4,
    "phm_init_range": 0.0001, "phm_rank": 1, "shared_W_phm": False, "shared_phm_rule": True, "stochastic_depth": 0.0,
}  # fmt: skip
"""Further fields, at the library's defaults, which do not change what the tensors mean."""
_NEUTRAL = {
    "adapter_residual_before_ln": False, "inv_adapter": None, "ln_before": False, "original_ln_after": True, "phm_layer": False,
    "residual_before_ln": True, "use_gating": False,
}  # fmt: skip
"""Further fields that do, at the only values that Byway has an equal for."""


class AdapterHub(Format):
    """The format of the ``adapters`` library; asked before peft's, whose configuration has the same file name."""

    order = 10
    label = "adapters"
    files = (CONFIG, WEIGHTS, HEAD_CONFIG, HEAD_WEIGHTS)

    def reads(self, directory: Path) -> bool:
        return super().reads(directory) and is_config(read_json(directory / CONFIG))

    def declines(self, adapter: Attached) -> str:
        method, model = adapter.method, adapter.model
        if not isinstance(method, BottleneckAdapter | ParallelAdapter):
            return f"{type(method).__name__} is no bottleneck adapter"
        installed = adapter.side_paths()
        other = [type(side).__name__ for _, side in installed if not isinstance(side, Bottleneck | Tap | TrainedCopy)]
        if other:
            return f"it holds no {other[0]}"
        if facts(model).model_type not in _HOMES:
            return f"it is not known where the library keeps adapters of {facts(model).model_type!r} models"
        if method.layer_norm == "in":
            return "the library cannot write a norm on what the adapter reads"
        places = [place for place, _ in _placed(adapter)]
        if isinstance(method, ParallelAdapter) and any(p.part.norm is None and method.reads == "input" for p in places):
            return "the library's parallel adapter reads the residual stream"
        if {place.width for place in places} != {_width(model)}:
            return "the model's layers are of different widths"
        used = {place.part.layer for place in places}
        if {p.part.output for p in places} != {p.output for p in sublayers(model) if p.role in _roles(method) and p.layer in used}:
            return "it leaves places out other than by layers"
        outside = [site.path for site, side in installed if isinstance(side, TrainedCopy) and "." in site.path]
        return f"{outside[0]} is trained whole and is not a head at the model's root" if outside else ""

    def save(self, adapter: Attached, directory: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
        model = adapter.model
        settings: Any = model.config
        placed = _placed(adapter)
        tensors = {key: tensor.detach() for key, tensor in _tensors_by_name(model, placed, adapter.name).items()}
        copies = {site.path: side for site, side in adapter.side_paths() if isinstance(side, TrainedCopy)}
        about = {
            "model_type": settings.model_type,
            "hidden_size": _width(model),
            "model_class": type(model).__name__,
            "model_name": settings._name_or_path or "",
            "version": VERSION,
        }
        readme = (
            f"# {type(adapter.method).__name__}\n\n{adapter.num_parameters:,} trained parameters for a {type(model).__name__}, "
            "in the format of the adapters library.\n\n"
            f"```python\nimport byway\nbyway.load(model, 'PATH')          # or, there: model.load_adapter('PATH', set_active=True)\n```\n"
        )
        texts = {CONFIG: to_json(about | {"name": adapter.name, "config": _config(adapter, placed)}), README: readme}
        files: dict[str, tuple[dict[str, Tensor], dict[str, str]]] = {WEIGHTS: (tensors, make_record(adapter, tensors, tokenizer))}
        if copies:  # everything outside the trunk, with the trained copies in it
            names = checkpoint_names(model)
            trunks = (_trunk_prefix(model), *(f"{path.partition('.')[0]}." for path in facts(model).stack_modules.values()), "shared.")
            head = {key: tensor for key, tensor in base_state_dict(model).items() if not key.startswith(trunks)}
            head |= {f"{path}.{key}": tensor for path, side in copies.items() for key, tensor in side.export().items()}
            labels = {"label2id": settings.label2id, "num_labels": settings.num_labels}
            texts[HEAD_CONFIG] = to_json(about | {"name": None, "config": None} | labels)
            files[HEAD_WEIGHTS] = {_head_name(names, key): tensor.detach() for key, tensor in head.items()}, {"format": "pt"}
        write(directory, texts, files)

    def load(self, model: nn.Module, directory: Path, options: LoadOptions) -> Loaded:
        read = _Read(directory / CONFIG)
        config = read_json(read.file)
        if not isinstance(config.get("config"), dict) or not isinstance(config.get("name"), str):
            raise AdapterError(
                f"{read.file}: 'config' must be an object and 'name' a string", "save it again with a current adapters library"
            )
        tensors, metadata = read_weights(
            directory / WEIGHTS, "load it with the adapters library where you trust it, and save it with use_safetensors=True"
        )
        recorded = read_record(metadata, tensors, directory / WEIGHTS)
        kind = facts(model).model_type
        if options.check_base and config.get("model_type") not in (None, kind):
            raise AdapterError(
                f"{read.file}: made for a {config['model_type']!r} model, this is a {kind!r}", "load that base, or pass check_base=False"
            )
        head = _read_head(read, directory, model)
        method = _method(read, config["config"], model, tuple(head), options.allow_unknown_fields)
        with errors_in(read.file):
            context = BuildContext(options.tokenizer, generator=torch.Generator(), trusted=False, filled=True)
            plan, notes = planned(model, method, context)
            placed = [(site, side) for site, side in plan if isinstance(site, Place) and isinstance(side, Bottleneck)]
            expected = _tensors_by_name(model, placed, config["name"])
        read.notes += check_base(recorded, model, list(head), options, directory)
        prefix = _trunk_prefix(model)
        expected = {key.removeprefix(prefix): tensor for key, tensor in expected.items()}
        found = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
        check_tensors(expected, found, directory / WEIGHTS)
        names = checkpoint_names(model)
        copied = [(site.path, side) for site, side in plan if isinstance(side, TrainedCopy)]
        copies = {_head_name(names, f"{path}.{key}"): tensor for path, side in copied for key, tensor in side.export().items()}
        trained = {key: tensor for group in head.values() for key, tensor in group.items()}
        if copies or trained:
            check_tensors(copies, trained, directory / HEAD_WEIGHTS)
        read.notes += [*notes, *fill(expected, found), *fill(copies, trained)]
        return Loaded(method, plan, read.notes)


def is_config(config: Mapping[str, Any]) -> bool:
    """True if an ``adapter_config.json`` is the library's, not peft's."""
    return "peft_type" not in config and "config" in config and ("model_class" in config or "model_type" in config)


def _layers_of(model: nn.Module) -> list[str]:
    """Return all layers in the order in which the library counts them: one stack after the other."""
    return [layer for layers in facts(model).stacks.values() for layer in layers]


def _tensors_by_name(model: nn.Module, placed: Sequence[tuple[Place, Bottleneck]], name: str) -> dict[str, Tensor]:
    """Return key in the file → tensor of a side path, for an adapter that is called `name` there."""
    model_type = facts(model).model_type
    homes = _HOMES.get(model_type)
    if homes is None:
        raise AdapterError(f"it is not known where the adapters library keeps adapters of {model_type!r} models")
    # the name of a layer in checkpoints, told from what the layer holds under the same name in both
    checkpoint, layer_names = checkpoint_names(model), {}
    for layer in _layers_of(model):
        inside = ((path[len(layer) :], there) for path, there in checkpoint.items() if path.startswith(f"{layer}.") and there is not None)
        layer_names[layer] = next((there.removesuffix(rest) for rest, there in inside if there.endswith(rest)), layer)
    found: dict[str, Tensor] = {}
    for place, side in placed:
        part = place.part
        if part.role not in homes:
            raise AdapterError(f"the adapters library has no place for an adapter after {part.role} in this family")
        below = f".{homes[part.role]}" if homes[part.role] else part.output[len(part.layer) :].rpartition(".")[0]
        own = dict(side.named_parameters())
        found |= {
            f"{layer_names[part.layer]}{below}.adapters.{name}.{theirs}": own[ours] for ours, theirs in _TENSOR_NAMES.items() if ours in own
        }
    return found


def _trunk_prefix(model: nn.Module) -> str:
    """Return the trunk's prefix in a model with a head; a file has it or not, depending on the saved class."""
    trunk: Any = model.base_model_prefix
    return f"{trunk}." if trunk else ""


def _head_name(names: Mapping[str, str | None], key: str) -> str:
    """Return a state-dict key as checkpoints call it."""
    path, _, leaf = key.rpartition(".")
    return f"{names.get(path) or path}.{leaf}"


def _placed(adapter: Attached) -> list[tuple[Place, Bottleneck]]:
    there = {site.path: side for site, side in adapter.side_paths() if isinstance(side, Bottleneck)}
    sites = adapter.method.plan(adapter.model).sites
    return [(site, there[site.path]) for site in sites if isinstance(site, Place) and site.path in there]


def _width(model: Any) -> int:
    return model.config.hidden_size


def _roles(method: BottleneckAdapter | ParallelAdapter) -> Sequence[str]:
    return method.roles if isinstance(method, BottleneckAdapter) else ("feed-forward",)


def _config(adapter: Attached, placed: Sequence[tuple[Place, Bottleneck]]) -> dict[str, Any]:
    """Return the library's ``BnConfig`` that builds exactly what is installed."""
    method, model = adapter.method, adapter.model
    assert isinstance(method, BottleneckAdapter | ParallelAdapter)
    roles, used = _roles(method), {place.part.layer for place, _ in placed}
    holding = {part.layer for part in sublayers(model) if part.role in roles}
    shape = placed[0][1].shape
    # a factor that gives this size when the width is divided by it and rounded down
    factors = (method.reduction, shape.width / shape.size, shape.width / (shape.size + 0.5))
    return {
        **_UNUSED,
        **_NEUTRAL,
        **{switch: role in roles for switch, role in _SWITCHES.items()},
        "is_parallel": isinstance(method, ParallelAdapter),
        "original_ln_before": isinstance(method, BottleneckAdapter) and method.variant == "pfeiffer",
        "ln_after": shape.layer_norm == "out",
        "non_linearity": _ACTIVATIONS[shape.activation],
        "init_weights": _INITS[shape.init],
        "scaling": shape.scaling if isinstance(shape.scaling, str) else float(shape.scaling),
        "dropout": shape.dropout,
        "reduction_factor": next((f for f in factors[:2] if bottleneck_size(shape.width, f, None) == shape.size), factors[2]),
        "leave_out": [i for i, layer in enumerate(_layers_of(model)) if layer in holding and layer not in used],
    }


@dataclass
class _Read:
    """What is noticed while a directory is read."""

    file: Path
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def finish(self, hint: str = "") -> None:
        if self.problems:
            raise AdapterError(f"{self.file}: {'; '.join(self.problems)}", hint)


def _method(read: _Read, inner: Mapping[str, Any], model: nn.Module, saved: Sequence[str], allow_unknown: bool) -> Method:
    """Return the method that the library's ``BnConfig`` describes."""
    if inner.get("architecture") is not None:
        raise AdapterError(
            f"{read.file}: it is no bottleneck adapter but {inner['architecture']!r}",
            "of the adapters library's methods only those are read",
        )
    known = {*_KNOWN, *_UNUSED, *_NEUTRAL, "architecture"}
    unknown = [] if allow_unknown else sorted(inner.keys() - known)
    close = {key: nearest(key, sorted(known)) for key in unknown}
    read.problems += [f"unknown field {key!r}" + (f" ({close[key]})" if close[key] else "") for key in unknown]
    read.problems += [
        f"the field {key!r} is missing" for key in ("mh_adapter", "output_adapter", "non_linearity", "reduction_factor") if key not in inner
    ]
    read.finish("written by a newer version? byway.load(..., allow_unknown_fields=True) leaves them out" if unknown else "")
    for key, neutral in _NEUTRAL.items():
        value = inner.get(key, neutral)
        if key == "residual_before_ln" and not inner.get("original_ln_before"):
            continue  # without the norm before it, the adapter's input and the residual are the same
        if key == "adapter_residual_before_ln" and not inner.get("ln_after"):
            continue
        if value != neutral:
            read.problems.append(f"{key} is {value!r}; only {neutral!r} is read")
    if inner.get("stochastic_depth"):
        read.notes.append("stochastic_depth acts in training only and is left out")
    read.finish("an adapter of that kind has no equal here")
    activations = {theirs: ours for ours, theirs in _ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu_tanh"}
    inits = {theirs: ours for ours, theirs in _INITS.items()}
    activation, init = inner["non_linearity"], inner.get("init_weights", "bert")
    scaling, reduction = inner.get("scaling", 1.0), inner["reduction_factor"]
    if not isinstance(activation, str) or activation.lower() not in activations:
        read.problems.append(f"non_linearity is {activation!r}; known are {listed(activations)}")
    if init not in inits:
        read.problems.append(f"init_weights is {init!r}; known are {listed(inits)}")
    if scaling != "learned" and (isinstance(scaling, bool) or not isinstance(scaling, int | float)):
        read.problems.append(f"scaling is {scaling!r}; a number or 'learned' is read")
    if isinstance(reduction, bool) or not isinstance(reduction, int | float):
        read.problems.append(f"reduction_factor is {reduction!r}; one number for all layers is read")
    read.finish()
    roles = _read_roles(read, inner)
    fields: dict[str, Any] = {
        "reduction": reduction,
        "activation": activations[activation.lower()],
        "init": inits[init],
        "scaling": scaling,
        "dropout": inner.get("dropout", 0.0),
        "layer_norm": "out" if inner.get("ln_after") else "none",
        "layers": _read_layers(read, inner.get("leave_out") or [], roles, model),
        "modules_to_save": saved or "none",
    }
    read.finish()
    with errors_in(read.file):
        if inner.get("is_parallel"):
            post = all(part.norm is not None for part in sublayers(model) if part.role == "feed-forward")
            return ParallelAdapter(reads="input" if post else "residual", **fields)
        variant = "pfeiffer" if inner.get("original_ln_before") else "houlsby"
        return BottleneckAdapter(variant=variant, places=roles, norms=False, **fields)


def _read_roles(read: _Read, inner: Mapping[str, Any]) -> tuple[Where, ...]:
    roles: tuple[Where, ...] = tuple(role for switch, role in _SWITCHES.items() if inner.get(switch))
    if not roles:
        read.problems.append("it has an adapter in no place (mh_adapter, output_adapter and cross_adapter are all off)")
    if inner.get("is_parallel") and roles != ("feed-forward",):
        read.problems.append(f"it is parallel to {listed(roles)}; only beside the feed-forward part alone is read")
    return roles


def _read_layers(read: _Read, leave_out: Any, roles: Sequence[str], model: nn.Module) -> list[int | str] | None:
    """Return the layers that are not left out, per stack; the library counts through all stacks."""
    if not isinstance(leave_out, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in leave_out):
        read.problems.append(f"leave_out is {leave_out!r}; a list of layer numbers is wanted")
        return None
    stacks = facts(model).stacks
    holding = {part.layer for part in sublayers(model) if part.role in roles}
    position = {layer: i for i, layer in enumerate(_layers_of(model))}
    if not any(position[layer] in leave_out for layer in holding):
        return None
    kept = {
        name: [i for i, layer in enumerate(own) if layer in holding and position[layer] not in leave_out] for name, own in stacks.items()
    }
    kept = {name: indices for name, indices in kept.items() if indices}
    if not kept:
        read.problems.append(f"leave_out {leave_out!r} leaves no layer")
        return None
    used = [name for name, own in stacks.items() if any(layer in holding for layer in own)]
    if len(used) == 1:
        return list(kept[used[0]])
    return [f"{name}:{','.join(map(str, indices))}" for name, indices in kept.items()]


def _read_head(read: _Read, directory: Path, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return head at the model's root → its tensors, if they differ from the base's. Note what is not read."""
    file = directory / HEAD_WEIGHTS
    if not file.exists():
        if (directory / "pytorch_model_head.bin").exists():
            read.notes.append("its head is kept as a pickle (pytorch_model_head.bin), which is never opened: the head was not loaded")
        return {}
    about = read_json(directory / HEAD_CONFIG)
    if about.get("config") is not None or about.get("model_class") != type(model).__name__:
        read.notes.append(f"its head is one of {about.get('model_class')}, not of {type(model).__name__}: the head was not loaded")
        return {}
    tensors, _ = read_safetensors(file)
    names, base = checkpoint_names(model), base_state_dict(model)
    here = {_head_name(names, key): (key, tensor) for key, tensor in base.items()}
    unknown = [key for key in tensors if key not in here]
    if unknown:
        raise AdapterError(f"{file}: {most(unknown)} are not in this model", "was it saved from this model class?")
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        groups.setdefault(here[key][0].partition(".")[0], {})[key] = tensor

    def same(tensor: Tensor, own: Tensor) -> bool:
        return tensor.shape == own.shape and torch.equal(tensor.to(own), own)

    modules = dict(base_modules(model))
    return {
        top: group
        for top, group in groups.items()
        if top in modules and not all(same(tensor, here[key][1]) for key, tensor in group.items())
    }
