"""Reading a directory of the ``adapters`` library: everything is checked before the model is touched, and every tensor must land."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from byway.core.adapter import Adapter
from byway.core.attach import hang, planned
from byway.core.copies import TrainedCopy
from byway.core.families import checkpoint_names, facts
from byway.core.families.sublayers import sublayers
from byway.core.method import BuildContext, Method
from byway.core.slots import base_modules, base_state_dict
from byway.disk.files import read_json, read_safetensors
from byway.errors import AdapterError, BywayError, listed, nearest
from byway.formats.adapterhub.save import (
    ACTIVATION_NAMES,
    HEAD_CONFIG,
    HEAD_WEIGHTS,
    INIT_NAMES,
    NEUTRAL,
    WEIGHTS,
    expected,
    head_name,
    prefix_of,
    used_layers,
)
from byway.formats.peft.config import CONFIG
from byway.formats.record import check_base, check_tensors, fill, most, read_record
from byway.methods.bottleneck.places import Place
from byway.methods.bottleneck.sides import Bottleneck
from byway.methods.bottleneck_adapter import BottleneckAdapter, Where
from byway.methods.parallel_adapter import ParallelAdapter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_adapter"]

_OWN = (
    "mh_adapter", "output_adapter", "cross_adapter", "is_parallel", "original_ln_before", "ln_after", "non_linearity", "init_weights",
    "scaling", "dropout", "reduction_factor", "leave_out",
)  # fmt: skip
_TRAINING_ONLY = ("init_weights_seed", "stochastic_depth")
_WITHOUT_PHM = ("factorized_phm_W", "hypercomplex_nonlinearity", "learn_phm", "inv_adapter_reduction_factor")


@dataclass
class _Read:
    """What comes up while a directory is read."""

    file: Path
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def finish(self, hint: str = "") -> None:
        if self.problems:
            raise AdapterError(f"{self.file}: {'; '.join(self.problems)}", hint)


def load_adapter(
    model: nn.Module,
    directory: Path,
    name: str = "default",
    *,
    trainable: bool = False,
    check: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    allow_unknown_fields: bool = False,
) -> Adapter:
    """Attach the adapter in `directory` to `model`; :func:`byway.load` explains the arguments.

    Raises:
        AdapterError: whatever is wrong with the files, or between them and the model; the model is then untouched.
    """
    read = _Read(directory / CONFIG)
    config = read_json(read.file)
    if not isinstance(config.get("config"), dict) or not isinstance(config.get("name"), str):
        raise AdapterError(f"{read.file}: 'config' must be an object and 'name' a string", "save it again with a current adapters library")
    tensors, metadata = _weights(directory)
    recorded = read_record(metadata, tensors, directory / WEIGHTS)
    kind = facts(model).model_type
    if check and config.get("model_type") not in (None, kind):
        raise AdapterError(
            f"{read.file}: made for a {config['model_type']!r} model, this is a {kind!r}", "load that base, or pass check_base=False"
        )
    head = _read_head(read, directory, model)
    method = _method(read, config["config"], model, tuple(head), allow_unknown_fields)
    try:
        plan, notes = planned(model, method, BuildContext(tokenizer, generator=torch.Generator(), trusted=False, filled=True))
        placed = [(site, side) for site, side in plan if isinstance(site, Place) and isinstance(side, Bottleneck)]
        wanted = expected(model, placed, config["name"])
    except BywayError as error:
        raise AdapterError(f"{read.file}: {error.message}", error.hint) from error
    if check:
        read.notes += check_base(recorded, model, list(head), tokenizer, directory)
    prefix = prefix_of(model)
    wanted = {key.removeprefix(prefix): tensor for key, tensor in wanted.items()}
    found = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    check_tensors(wanted, found, directory / WEIGHTS)
    copies = _copies(model, [(site.path, side) for site, side in plan if isinstance(side, TrainedCopy)])
    trained = {key: tensor for group in head.values() for key, tensor in group.items()}
    if copies or trained:
        check_tensors(copies, trained, directory / HEAD_WEIGHTS)
    read.notes += [*notes, *fill(wanted, found), *fill(copies, trained)]
    return hang(model, method, name, plan, notes=tuple(read.notes), trainable=trainable)


def _weights(directory: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if (directory / WEIGHTS).exists():
        return read_safetensors(directory / WEIGHTS)
    pickles = sorted(entry.name for entry in directory.iterdir() if entry.suffix in (".bin", ".pt", ".pth", ".pkl"))
    if pickles:
        raise AdapterError(
            f"{directory} has its weights only as a pickle ({listed(pickles)}), which can run code and is never opened here",
            "load it with the adapters library where you trust it, and save it with use_safetensors=True",
        )
    raise AdapterError(f"{directory / WEIGHTS} is missing", f"there are: {listed(entry.name for entry in directory.iterdir())}")


def _method(read: _Read, inner: Mapping[str, Any], model: nn.Module, saved: Sequence[str], allow_unknown: bool) -> Method:
    """The method that the library's ``BnConfig`` describes."""
    if inner.get("architecture") is not None:
        raise AdapterError(
            f"{read.file}: it is no bottleneck adapter but {inner['architecture']!r}",
            "of the adapters library's methods only those are read",
        )
    known = {*_OWN, *NEUTRAL, "architecture"}
    unknown = [] if allow_unknown else sorted(inner.keys() - known)
    read.problems += [f"unknown field {key!r}{_hint(key, known)}" for key in unknown]
    read.problems += [
        f"the field {key!r} is missing" for key in ("mh_adapter", "output_adapter", "non_linearity", "reduction_factor") if key not in inner
    ]
    read.finish("written by a newer version? byway.load(..., allow_unknown_fields=True) leaves them out" if unknown else "")
    _refuse(read, inner)
    activations = {theirs: ours for ours, theirs in ACTIVATION_NAMES.items()} | {"gelu_pytorch_tanh": "gelu_tanh"}
    inits = {theirs: ours for ours, theirs in INIT_NAMES.items()}
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
    roles = _roles(read, inner)
    fields: dict[str, Any] = {
        "reduction": reduction,
        "activation": activations[activation.lower()],
        "init": inits[init],
        "scaling": scaling,
        "dropout": inner.get("dropout", 0.0),
        "layer_norm": "out" if inner.get("ln_after") else "none",
        "layers": _layers(read, inner.get("leave_out") or [], roles, model),
        "modules_to_save": saved or "none",
    }
    read.finish()
    try:
        if inner.get("is_parallel"):
            post = all(part.norm is not None for part in sublayers(model) if part.role == "feed-forward")
            return ParallelAdapter(reads="input" if post else "residual", **fields)
        variant = "pfeiffer" if inner.get("original_ln_before") else "houlsby"
        return BottleneckAdapter(variant=variant, places=roles, norms=False, **fields)
    except BywayError as error:
        raise AdapterError(f"{read.file}: {error.message}", error.hint) from error


def _hint(key: str, known: Sequence[str] | set[str]) -> str:
    close = nearest(key, sorted(known))
    return f" ({close})" if close else ""


def _refuse(read: _Read, inner: Mapping[str, Any]) -> None:
    """Fields that would change what the tensors mean, and that Byway has no equal for."""
    ignored = {*_TRAINING_ONLY, *_WITHOUT_PHM}
    for key, neutral in NEUTRAL.items():
        value = inner.get(key, neutral)
        if key.startswith(("phm_", "shared_", "factorized_")) and key != "phm_layer":
            continue
        if key == "residual_before_ln" and not inner.get("original_ln_before"):
            continue  # without the norm before it, what is read and what is kept are the same
        if key == "adapter_residual_before_ln" and not inner.get("ln_after"):
            continue
        if value != neutral and key not in ignored:
            read.problems.append(f"{key} is {value!r}; only {neutral!r} is read")
    if inner.get("stochastic_depth"):
        read.notes.append("stochastic_depth acts in training only and is left out")
    read.finish("an adapter of that kind has no equal here")


def _roles(read: _Read, inner: Mapping[str, Any]) -> tuple[Where, ...]:
    switches: tuple[tuple[str, Where], ...] = (
        ("mh_adapter", "attention"),
        ("cross_adapter", "cross-attention"),
        ("output_adapter", "feed-forward"),
    )
    roles: tuple[Where, ...] = tuple(role for key, role in switches if inner.get(key))
    if not roles:
        read.problems.append("it has an adapter in no place (mh_adapter, output_adapter and cross_adapter are all off)")
    if inner.get("is_parallel") and roles != ("feed-forward",):
        read.problems.append(f"it is parallel to {listed(roles)}; only beside the feed-forward part alone is read")
    return roles


def _layers(read: _Read, leave_out: Any, roles: Sequence[str], model: nn.Module) -> list[int | str] | None:
    """What is not left out, as layers of each stack; the library counts through all stacks."""
    if not isinstance(leave_out, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in leave_out):
        read.problems.append(f"leave_out is {leave_out!r}; a list of layer numbers is wanted")
        return None
    stacks = facts(model).stacks
    holding = {part.layer for part in sublayers(model) if part.role in roles}
    position = {layer: i for i, layer in enumerate(used_layers(model))}
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
    """Head at the model's root → its tensors, where the file brings others than the base's. What is not read is noted."""
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
    here = {head_name(names, key): (key, tensor) for key, tensor in base.items()}
    unknown = [key for key in tensors if key not in here]
    if unknown:
        raise AdapterError(f"{file}: {most(unknown)} are not in this model", "was it saved from this model class?")
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        groups.setdefault(here[key][0].partition(".")[0], {})[key] = tensor
    trained = {top for key, tensor in tensors.items() for top in [here[key][0].partition(".")[0]] if not _equal(tensor, here[key][1])}
    modules = dict(base_modules(model))
    return {top: group for top, group in groups.items() if top in trained and top in modules}


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.to(other), other)


def _copies(model: nn.Module, copies: Sequence[tuple[str, TrainedCopy]]) -> dict[str, Tensor]:
    names = checkpoint_names(model)
    return {head_name(names, f"{path}.{key}"): tensor for path, side in copies for key, tensor in side.export().items()}
