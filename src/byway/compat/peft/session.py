"""The adapters of one model, managed by peft's rules: one is active, switching freezes the others, a merge can be taken back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from byway.compat.peft.building import hang_config, saved_by_task, to_base_dtype
from byway.compat.peft.config import LNTuningConfig, PeftConfig
from byway.compat.peft.filling import fill_exactly
from byway.compat.peft.layers import dress, first_parts, undress
from byway.compat.peft.merging import merge_for_good, merge_layer, mergeable, merged_somewhere, unmerge_all, unmerge_layer
from byway.compat.peft.state import layer_of
from byway.core.adapter import Adapter, adapters
from byway.core.attach import activate, detach
from byway.core.copies import TrainedCopy, TrainedRows
from byway.core.slots import Slot, base_modules, side_paths, slot_of, slots
from byway.errors import AdapterError, NotMergeable
from byway.formats.peft.config import write_targets

__all__ = ["Session", "session_of"]

_SESSION = "_byway_peft_session"
_KEEP_THE_BASE = ("gaussian", "eva", "orthogonal")
"""Starts by name at which peft leaves the base's weights as they are."""


class Session:
    """What peft keeps in its tuner: configurations by adapter name, and which adapters are active."""

    def __init__(self, model: nn.Module) -> None:
        if session_of(model) is not None:
            warnings.warn("You are trying to modify a model with PEFT for a second time.", stacklevel=4)
        self.model = model
        self.configs: dict[str, PeftConfig] = {}
        self.active: list[str] = []
        vars(model)[_SESSION] = self

    def slots(self) -> Iterator[tuple[str, nn.Module, Slot]]:
        return slots(self.model)

    def sync(self) -> None:
        """Give every adapted module peft's names and let act what peft would let act."""
        for path, module, slot in list(self.slots()):
            if path:
                dress(module)
            layer = layer_of(module)
            layer.active = list(self.active)
            layer.apply(slot)

    def add(self, config: PeftConfig, name: str, *, cast: bool = True) -> None:
        """Attach `config` as adapter `name`; the first becomes active, a later one waits."""
        self._check_new(config, name)
        was = _disabled(self.model)
        try:
            adapter = hang_config(self.model, config, name, cast=cast)
        except Exception:
            self.sync()
            raise
        self._register(config, name, was)
        if "target_modules" in vars(config) and vars(config)["target_modules"] is None:
            chosen = [site.path for site, side in adapter.side_paths() if first_parts(side)]
            saved: list[str] = list(vars(config).get("modules_to_save") or ())
            paths = [path for path, _ in base_modules(self.model) if path]
            written = write_targets(chosen, paths, saved) if chosen else {}
            vars(config)["target_modules"] = set(written["target_modules"]) if written else None
            if written.get("exclude_modules"):
                vars(config)["exclude_modules"] = written["exclude_modules"]

    def load(self, config: PeftConfig, directory: Path, name: str, *, trainable: bool, cast: bool = True) -> None:
        """Attach the adapter in `directory` as `name`, strictly: every tensor must land, every expected one must be there."""
        from byway.formats.load import load

        self._check_new(config, name)
        was = _disabled(self.model)
        activate(self.model, []) if adapters(self.model) else None
        start = vars(config).get("init_lora_weights", True)
        try:
            if isinstance(config, LNTuningConfig):
                adapter = self._load_into(config, directory, name, cast=cast)
            elif isinstance(start, str) and start.lower() not in _KEEP_THE_BASE:
                adapter = self._load_subtracted(config, directory, name, cast=cast)
            else:
                adapter = load(self.model, directory, name, trainable=trainable, check_base=False)
        except Exception:
            self.sync()
            raise
        if not cast:
            to_base_dtype(self.model, adapter.side_paths())
        self._register(config, name, was)

    def _load_subtracted(self, config: PeftConfig, directory: Path, name: str, *, cast: bool) -> Adapter:
        """A file whose factors stand beside a base that peft has changed at the start (PiSSA, OLoRA): the same start is subtracted here."""
        if str(vars(config)["init_lora_weights"]).lower() not in ("pissa", "olora"):
            raise AdapterError(
                f"{directory}: made with init_lora_weights={vars(config)['init_lora_weights']!r}, whose start cannot be computed again",
                "save it with peft's path_initial_model_for_weight_conversion",
            )
        return self._load_into(config, directory, name, cast=cast)

    def _load_into(self, config: PeftConfig, directory: Path, name: str, *, cast: bool) -> Adapter:
        """Hang what the configuration says, then fill it from the file."""
        adapter = hang_config(self.model, config, name, cast=cast)
        try:
            fill_exactly(adapter, directory)
        except Exception:
            detach(self.model, name)
            raise
        return adapter

    def _register(self, config: PeftConfig, name: str, disabled: bool) -> None:
        self.configs[name] = config
        if not self.active:
            self.active = [name]
        heads = saved_by_task(config)
        if heads and "modules_to_save" in vars(config):
            own = vars(config)["modules_to_save"] or []
            vars(config)["modules_to_save"] = list(dict.fromkeys([*([own] if isinstance(own, str) else own), *heads]))
        self.set_active(self.active)
        if disabled:
            self.enable(False)

    def _check_new(self, config: PeftConfig, name: str) -> None:
        if name in self.configs:
            raise AdapterError(f"Adapter with name '{name}' already exists. Please use a different name.")
        kinds = [str(c.peft_type) for c in (config, *self.configs.values())]
        if len(kinds) > 1 and kinds[0] == "ADALORA" and not config.inference_mode and "ADALORA" in kinds[1:]:
            raise AdapterError("AdaLoraModel supports only 1 trainable adapter. When using multiple adapters, set inference_mode to True.")
        if self.configs and vars(config).get("bias", "none") != "none":
            raise AdapterError("peft supports only 1 adapter with bias. When using multiple adapters, set bias to 'none' for all adapters.")
        kinds = {c.is_prompt_learning for c in self.configs.values()}
        if kinds and config.is_prompt_learning not in kinds:
            raise AdapterError("a prompt and another kind of adapter do not go into one PeftModel", "byway.attach takes both")
        if merged_somewhere(self.model):
            raise AdapterError("the model is merged: an adapter cannot be added to it", "unmerge_adapter() first")

    def set_active(self, names: str | Sequence[str], *, inference_mode: bool = False) -> None:
        """Make exactly `names` active; their tensors are trained, those of the others are not."""
        wanted = [names] if isinstance(names, str) else list(names)
        for name in wanted:
            self.known(name)
        self._check_rivals(wanted)
        if merged_somewhere(self.model) and wanted != self.active:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=3)
            unmerge_all(self.model)
        self.active = wanted
        self.sync()
        frozen = {name for name in wanted if self.configs[name].inference_mode} if not inference_mode else set(wanted)
        for _, name, side in side_paths(self.model):
            side.requires_grad_(name in wanted and name not in frozen)

    def _check_rivals(self, names: Sequence[str], *, merging: bool = False) -> None:
        for path, _, slot in self.slots():
            for kind, called in ((TrainedCopy, "ModulesToSaveWrapper"), (TrainedRows, "TrainableTokensWrapper")):
                rivals = {name for name, side in slot.sides() if name in names and isinstance(side, kind)}
                own = [side.indices.tolist() for name, side in slot.sides() if name in rivals and isinstance(side, TrainedRows)]
                apart = merging and kind is TrainedRows and len({row for rows in own for row in rows}) == sum(map(len, own))
                if len(rivals) > 1 and not apart:
                    raise AdapterError(f"Only one adapter can be set at a time for {called}; {path} has {sorted(rivals)}")

    def known(self, name: str) -> None:
        """Refuse the name of an adapter that is not there."""
        if name not in self.configs:
            raise AdapterError(f"Adapter {name} does not exist: adapter not found in {list(self.configs)}")

    def delete(self, name: str) -> None:
        """Detach adapter `name`; if it was active, another takes its place."""
        self.known(name)
        if any(name in layer_of(module).merged for _, module, _ in self.slots()):
            raise AdapterError(f"Cannot delete adapter(s) ['{name}'] while they are merged. Please unmerge them first.")
        touched = [module for _, module, _ in self.slots()]
        disabled = _disabled(self.model)
        detach(self.model, name)
        del self.configs[name]
        for module in touched:
            layer_of(module).scales.pop(name, None)
            if slot_of(module) is None:
                undress(module)
        if not self.configs:
            self.freeze()
        if name in self.active:
            left = [n for n in self.active if n != name] or list(self.configs)[:1]
            self.active = left
            if left and left != self.active:
                warnings.warn(f"Adapter {name} was active which is now deleted. Setting active adapter to {left[0]}.", stacklevel=3)
        if merged_somewhere(self.model):
            self.sync()
        elif self.configs:
            self.set_active(self.active)
            if disabled:
                self.enable(False)

    def freeze(self) -> None:
        """Base parameters stay frozen when peft's adapters are gone."""
        self.model.requires_grad_(False)

    def enable(self, enabled: bool) -> None:
        """Switch all adapters on or off; nothing is trained while they are off."""
        if not enabled and merged_somewhere(self.model):
            unmerge_all(self.model)
        for _, module, slot in self.slots():
            layer = layer_of(module)
            layer.disabled = not enabled
            layer.apply(slot)
        for _, name, side in side_paths(self.model):
            side.requires_grad_(enabled and name in self.active and not self.configs[name].inference_mode)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The bare base answers within this context."""
        states = {layer_of(module).disabled for _, module, _ in self.slots()}
        if len(states) > 1:
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are disabled. This is most likely unintentional. "
                "After exiting the disable_adapter context, all adapters will be enabled",
                stacklevel=4,
            )
        flags = {id(p): p.requires_grad for _, _, side in side_paths(self.model) for p in side.parameters()}
        self.enable(False)
        try:
            yield
        finally:
            if states != {True}:
                self.enable(True)
                for _, _, side in side_paths(self.model):
                    for parameter in side.parameters():
                        parameter.requires_grad_(flags.get(id(parameter), parameter.requires_grad))

    def merge(self, names: Sequence[str] | None = None, *, safe: bool = False) -> None:
        """Merge adapters (default: the active ones) so that it can be taken back; all or nothing."""
        done: list[nn.Module] = []
        already = merged_somewhere(self.model)
        self._check_mergeable(names or self.active)
        for _, module, _ in self.slots():
            before = bool(layer_of(module).merged)
            try:
                changed = merge_layer(module, names, safe=safe)
            except Exception:
                for other in done:
                    unmerge_layer(other)
                raise
            if changed and not before:
                done.append(module)
        if not done and already and names is None:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=3)

    def _check_mergeable(self, names: Sequence[str]) -> None:
        for name in names:
            self.known(name)
            if self.configs[name].is_prompt_learning:
                raise NotMergeable(f"adapter {name!r} consists of virtual tokens: it has no equal in the base's weights")

    def unmerge(self) -> None:
        """Take every merge back: the base's parameters are the very tensors they were."""
        if not merged_somewhere(self.model):
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
            return
        unmerge_all(self.model)

    def unload(self, names: Sequence[str] | None = None, *, merge: bool, safe: bool = False) -> nn.Module:
        """The plain model: with adapters (default: the active ones) merged for good, or as it was."""
        wanted = list(self.active if names is None else names)
        if merged_somewhere(self.model):
            unmerge_all(self.model)
        self._check_mergeable(wanted if merge else [])
        self._check_rivals(wanted if merge else [], merging=True)
        if merge:
            self._untie_notice(wanted)
            for name in wanted:
                merge_for_good(self.model, name, safe=safe)
        for name in list(adapters(self.model)):
            detach(self.model, name)
        for _, module in base_modules(self.model):
            undress(module)
        self.freeze()
        for attribute in (_SESSION, "peft_config"):
            vars(self.model).pop(attribute, None)
        return self.model

    def _untie_notice(self, names: Sequence[str]) -> None:
        from byway.core.copies import tied_to

        tied = [path for path, module, _ in self.slots() if any(mergeable(module, n) for n in names) and tied_to(self.model, path)]
        if tied:
            warnings.warn(f"Setting `tie_word_embeddings` to False: {tied[0]} is merged and what was tied to it is not", stacklevel=4)


def _disabled(model: nn.Module) -> bool:
    """Whether adapters are switched off as a whole."""
    states = {layer_of(module).disabled for _, module, _ in slots(model)}
    return states == {True}


def session_of(model: nn.Module) -> Session | None:
    """The session of a model that peft's interface has been used on."""
    return vars(model).get(_SESSION)
