"""Read an adapter directory in HF peft's format: plan, check everything, then attach in one step.

Legend: a *file path* is a module's name in the file. It differs from the *module path* for models that transformers 5
renamed (ViT) and files written before. A plan lists what is to be installed where; the model is not touched before
the plan is filled and checked.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from byway.core.copies import TrainedCopy, held_biases, tied_to
from byway.core.families import checkpoint_names
from byway.core.families.facts import inside
from byway.core.method import BuildContext, Method
from byway.core.slots import SidePath, Site, base_modules
from byway.core.targets.resolve import pattern_value
from byway.core.token_rows import TiedRows, TrainedRows
from byway.errors import AdapterError, TargetError, listed
from byway.formats.format import Loaded, LoadOptions
from byway.formats.peft.config import CONFIG, PREFIX, WEIGHTS, Selection, peft_format, read_config, selected_by_ending
from byway.formats.peft.save import exactly, key_of
from byway.formats.peft.vocabulary import Vocabulary
from byway.formats.record import check_base, check_tensors, destinations, errors_in, fill, read_record, read_weights
from byway.methods import load as load_method
from byway.methods import names as method_names
from byway.methods import of_peft_config

__all__ = ["described", "load_adapter"]

Plan = list[tuple[Site, SidePath]]


@dataclass(frozen=True)
class _File:
    """An adapter's files, read, and the names of the model's modules in them."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    names: dict[str, str]
    """File path → module path."""

    @property
    def weights(self) -> Path:
        return self.directory / WEIGHTS

    def has(self, file_path: str) -> bool:
        """True if there is a tensor below this path."""
        prefix = key_of(file_path, "")
        return any(key.startswith(prefix) for key in self.tensors)

    def called(self, module_path: str) -> str:
        """Return the file path of a module path."""
        return next((there for there, here in self.names.items() if here == module_path), module_path)


def _config_of(directory: Path, options: LoadOptions, notes: list[str]) -> tuple[dict[str, Any], type[Method]]:
    """Return the configuration and the method that it describes."""
    known = {m.peft.peft_type for m in (*options.methods, *map(load_method, method_names())) if m.peft is not None}
    config = read_config(directory, known, allow_unknown_fields=options.allow_unknown_fields, notes=notes)
    kind = of_peft_config(config, options.methods)
    if kind is None:
        raise AdapterError(f"{directory / CONFIG}: no method has peft_type {config['peft_type']!r}")
    return config, kind


def described(directory: Path, options: LoadOptions) -> Method:
    """Return the method as the configuration writes it; ``Format.describe`` explains the arguments and errors."""
    config, kind = _config_of(directory, options, [])
    with errors_in(directory / CONFIG):
        peft = peft_format(kind)
        return peft.method(kind, peft.normalized(config))


def load_adapter(model: nn.Module, directory: Path, options: LoadOptions) -> Loaded:
    """Read the peft adapter in `directory` for `model`; ``Format.load`` explains the arguments and errors."""
    notes: list[str] = []
    config, kind = _config_of(directory, options, notes)
    tensors, metadata = read_weights(
        directory / WEIGHTS, "load it with peft where you trust it, and save it again: peft then writes adapter_model.safetensors"
    )
    recorded = read_record(metadata, tensors, directory / WEIGHTS)
    tensors = peft_format(kind).from_file(config, tensors, model)
    modules = dict(base_modules(model))
    file = _File(directory, config, tensors, _file_names(model, modules, tensors))
    selection = Selection(config)
    copies = _copies(file, selection, model, notes)
    notes += check_base(recorded, model, [site.path for site, _ in copies], options, directory)
    keys = {path: key_of(file.called(path), "") for path in modules}
    vocabulary = Vocabulary(model, keys, tensors, [site.path for site, _ in copies], file.weights)
    targets = _targets(file, selection, {site.path for site, _ in copies}, notes)
    method = replace(_method(file, kind, model, targets, copies, notes), **options.fields)
    context = BuildContext(generator=torch.Generator())  # initial values are overwritten: leave the user's random state alone
    wanted = {file.names[name] for name in targets}
    with errors_in(directory):
        # a path may also match as the end of a longer one
        everywhere = config.get("target_modules") is None  # a prompt has no targets
        sites = [site for site in method.plan(model).sites if everywhere or site.path in wanted] if everywhere or wanted else []
        sides = [(site, method.build(site, model, context)) for site in sites]
        extras = [pair for pair in method.extras(model, context, sites) if not any(inside(pair[0].path, copy.path) for copy, _ in copies)]
    plan = [*sides, *copies, *extras]

    def keys_of(some: Plan) -> dict[str, Tensor]:
        return {key_of(file.called(site.path), own): place for site, side in some for own, place in destinations(side).items()}

    # what a changed field adds (rows of new tokens, biases) starts from the base
    added = keys_of(extras).keys() - tensors.keys() if options.fields else ()
    expected = {key: place for key, place in keys_of(plan).items() if key not in added}
    # peft also writes the second name of a tied bias
    held = [key for path in held_biases(model) if (key := key_of(file.called(path), "bias")) not in expected]
    check_tensors(expected, tensors, file.weights, [*held, *_second_copies(file, plan), *vocabulary.surplus(expected)])
    notes += fill(expected, tensors)
    if declined := peft_format(kind).declines(method, model, plan):
        notes.append(f"HF peft computes something else with this file: {declined}")
    return Loaded(method, [*vocabulary.replacements(expected, notes), *plan], notes)


def _file_names(model: nn.Module, modules: Mapping[str, nn.Module], tensors: Collection[str]) -> dict[str, str]:
    """Return file path → module path, in today's names or those of checkpoints, whichever fit more tensors."""
    today = {path: path for path in modules if path}
    there = {path: name for path, name in checkpoint_names(model).items() if name and path and name != path}
    if not there:
        return today
    older = {there.get(path, path): path for path in today}

    def fitting(names: Mapping[str, str]) -> int:
        """Count the tensors below a module that owns parameters."""
        own = {name for name, path in names.items() if any(True for _ in modules[path].parameters(recurse=False))}
        return sum(any(prefix in own for prefix in _prefixes(key.removeprefix(PREFIX))) for key in tensors)

    return older if fitting(older) > fitting(today) else today


def _prefixes(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


def _copies(file: _File, selection: Selection, model: nn.Module, notes: list[str]) -> Plan:
    """Return the modules that the file holds whole. Note entries that match nothing and have no tensor."""
    found: list[str] = []
    for entry in selection.to_save:
        matching = [name for name in file.names if name.endswith(entry)]
        if not matching and not file.has(entry):
            notes.append(f"modules_to_save {entry!r} matches nothing here and has no tensor in the file")
        found += [name for name in matching if file.has(name) or name == entry or name.endswith(f".{entry}")]
    if file.config.get("ensure_weight_tying"):
        tied = [file.called(path) for name in found for path in tied_to(model, file.names[name])]
        found += [name for name in tied if key_of(name, "weight") in file.tensors]
    outermost = [name for name in dict.fromkeys(found) if not any(name.startswith(f"{other}.") for other in found)]
    modules = dict(base_modules(model))
    return [(Site(path, modules[path]), TrainedCopy(modules[path])) for path in (file.names[name] for name in outermost)]


def _targets(file: _File, selection: Selection, copied: Collection[str], notes: list[str]) -> list[str]:
    """Return the file paths of the selected modules. Entries that match nothing and have no tensor are noted."""
    if selection.targets is None:
        return []
    try:
        chosen = [name for name in file.names if selection.is_target(name)]
    except TargetError as error:
        notes.append(f"the file's tensors decide what is adapted, its expression is not used: {error.message}")
        own = {prefix for key in file.tensors for prefix in _prefixes(key.removeprefix(PREFIX))[:2]}
        chosen = [name for name in file.names if name in own]
    if isinstance(selection.targets, list):
        idle = [t for t in selection.targets if not any(n == t or n.endswith(f".{t}") for n in file.names) and not file.has(t)]
        notes += [f"target_modules {listed(idle)} match nothing here and have no tensor in the file"] if idle else []
    return [name for name in chosen if not any(inside(file.names[name], copy) for copy in copied)]


def _method(file: _File, kind: type[Method], model: nn.Module, targets: Sequence[str], copies: Plan, notes: list[str]) -> Method:
    """Return the described method, with targets as written if they select the same in this model, else by path."""
    paths = [file.names[name] for name in targets]
    peft = peft_format(kind)
    with errors_in(file.directory / CONFIG):
        config = peft.normalized(file.config)
    saved = [site.path for site, _ in copies]
    for field in ("rank_pattern", "alpha_pattern"):
        own = config.get(field) or {}
        idle = [key for key in own if not any(pattern_value(name, {key: True}, False) for name in targets)]
        if idle:
            notes.append(f"{field} {listed(idle)} matches no adapted module")
        config[field] = {key: value for key, value in own.items() if key not in idle}
    config["modules_to_save"] = [entry for entry in config.get("modules_to_save") or [] if any(p.endswith(entry) for p in saved)] or None
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = [t for t in config["target_modules"] if any(p == t or p.endswith(f".{t}") for p in paths)]
    explicit = config | {"target_modules": paths, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    explicit["modules_to_save"] = saved or None
    if config.get("feedforward_modules") is not None:
        scaled = set(map(file.called, paths)) & set(selected_by_ending(config["feedforward_modules"], file.names))
        config["feedforward_modules"] = explicit["feedforward_modules"] = [path for path in paths if file.called(path) in scaled]
    for field in ("rank_pattern", "alpha_pattern"):
        values = {path: pattern_value(name, config[field], None) for name, path in zip(targets, paths, strict=True)}
        explicit[field] = {exactly(path): value for path, value in values.items() if value is not None}
    with errors_in(file.directory / CONFIG):
        as_written = peft.method(kind, config)
        try:
            if targets and {site.path for site in as_written.plan(model).sites} == set(paths):
                return as_written
        except TargetError:
            pass  # written for peft's rules, which ours do not include: by path instead
        return peft.method(kind, explicit)


def _second_copies(file: _File, plan: Plan) -> list[str]:
    """Return the keys of what peft writes twice: a module trained whole, and the trained rows of a tied weight."""
    extra: list[str] = []

    def equal(key: str, other: str) -> bool:
        return key in file.tensors and other in file.tensors and torch.equal(file.tensors[key], file.tensors[other])

    rows = {id(side): site.path for site, side in plan if isinstance(side, TrainedRows)}
    for site, side in plan:
        name = file.called(site.path)
        if isinstance(side, TrainedCopy):
            extra += [key for key in file.tensors if key.startswith(key_of(name, "original_module."))]
            second = [(key, key.removeprefix(key_of(name, "modules_to_save."))) for key in file.tensors]
            extra += [key for key, own in second if key != own and equal(key, key_of(name, own))]
        if isinstance(side, TiedRows):
            own = TrainedRows.peft_names["rows"]
            extra += [key for key in [key_of(name, own)] if equal(key, key_of(file.called(rows[id(side.source)]), own))]
    return extra
