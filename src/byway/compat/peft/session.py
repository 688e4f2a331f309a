"""peft's ``LoraModel`` and its like: the adapters of one model by peft's rules.

One adapter is active, switching freezes the others, and merges can be undone. The operators that combine adapters are
in :mod:`byway.workshop.combine`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from byway.compat.peft.building import attach_config, task_heads, to_base_dtype
from byway.compat.peft.config import AdaLoraConfig, LNTuningConfig, PeftConfig
from byway.compat.peft.layers import AuxiliaryWrapper, Layer, broken, dress, first_parts, layer_of, undress
from byway.compat.peft.weighted import Combination
from byway.core.adapter import Adapter, adapters, roots
from byway.core.attach import activate, detach
from byway.core.copies import TrainedCopy, tied_to
from byway.core.disk.files import read_safetensors
from byway.core.merge import merge
from byway.core.slots import base_modules, penalties, side_paths, slot_of, slots
from byway.core.targets.search import ALL_LINEAR
from byway.core.token_rows import TrainedRows
from byway.errors import AdapterError, NotMergeable
from byway.formats.load import load
from byway.formats.peft.config import WEIGHTS, peft_format, write_targets
from byway.formats.peft.save import key_of
from byway.formats.record import check_tensors, destinations, fill

__all__ = ["Session", "find_session", "session_of", "tensors_of"]

_SESSION = "_byway_peft_session"
_KEEP_THE_BASE = ("gaussian", "eva", "orthogonal")
"""Initializations by name at which peft leaves the base's weights unchanged."""
_PREFIXES = {"LORA": "lora_", "ADALORA": "lora_", "IA3": "ia3_", "LN_TUNING": "ln_tuning_"}
"""peft_type → how the names of the method's tensors begin."""


class Session(nn.Module):
    """A module that runs the model, with the state of peft's tuner: configurations by name, and the active adapters.

    Code written for peft finds the attributes of its model here too, so the names of this class must not hide any.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if session_of(model) is not None:
            warnings.warn("You are trying to modify a model with PEFT for a second time.", stacklevel=4)
        self.model = model
        self.peft_config: dict[str, PeftConfig] = {}
        self.active_adapters: list[str] = []
        vars(model)[_SESSION] = self

    @property
    def active_adapter(self) -> str | list[str]:
        return self.active_adapters[0] if len(self.active_adapters) == 1 else list(self.active_adapters)

    @property
    def prefix(self) -> str:
        """How the names of this method's tensors begin."""
        first = next(iter(self.peft_config.values()), None)
        return "lora_" if first is None else _PREFIXES[str(first.peft_type)]

    def adapted_layers(self) -> list[Layer]:
        """Return the records of all adapted modules."""
        return [layer_of(module) for _, module, _ in slots(self.model)]

    def has_merged_adapters(self) -> bool:
        """True if any module is merged."""
        return any(layer.merged for layer in self.adapted_layers())

    def adapters_disabled(self) -> bool:
        """True if all adapters are switched off."""
        return {layer.disabled for layer in self.adapted_layers()} == {True}

    def sync_adapters(self) -> None:
        """Give every adapted module peft's names and activate what peft would."""
        for path, module, _ in list(slots(self.model)):
            if path:
                dress(module)
            if isinstance(module, AuxiliaryWrapper):
                for _, root in roots(self.model):
                    root.watch.forget(path)
            layer = layer_of(module)
            layer.active = list(self.active_adapters)
            layer.apply()

    def check_adapter(self, name: str) -> None:
        """Refuse the name of an adapter that does not exist."""
        if name not in self.peft_config:
            raise AdapterError(f"Adapter {name} does not exist: adapter not found in {list(self.peft_config)}")

    def attach_config(self, config: PeftConfig, name: str, *, cast: bool = True) -> None:
        """Attach the adapter that `config` describes as `name`; only the first becomes active."""
        with self._attaching(config, name):
            adapter = attach_config(self.model, config, name, cast=cast)
        written = vars(config).get("target_modules", ())
        if written is None or (isinstance(written, str) and written.lower() == ALL_LINEAR):  # as in peft: the names chosen
            chosen = [site.path for site, side in adapter.side_paths() if first_parts(side)]
            paths = [path for path, _ in base_modules(self.model) if path]
            written = write_targets(chosen, paths, list(vars(config).get("modules_to_save") or ())) if chosen else {}
            vars(config)["target_modules"] = set(written["target_modules"]) if written else None
            if written.get("exclude_modules"):
                vars(config)["exclude_modules"] = written["exclude_modules"]

    def attach_directory(
        self, directory: Path, name: str, config: PeftConfig | None = None, *, trainable: bool, cast: bool = True
    ) -> PeftConfig:
        """Attach the adapter in `directory` as `name`; return its configuration (default: the one in the directory)."""
        own: PeftConfig = config or PeftConfig.from_pretrained(directory)
        own.inference_mode = not trainable
        init = vars(own).get("init_lora_weights", True)
        changed = isinstance(init, str) and init.lower() not in _KEEP_THE_BASE
        with self._attaching(own, name):
            if adapters(self.model):
                activate(self.model, [])
            if changed and init.lower() not in ("pissa", "olora"):
                raise AdapterError(
                    f"{directory}: made with init_lora_weights={init!r}, whose initialization cannot be computed again",
                    "save it with peft's path_initial_model_for_weight_conversion",
                )
            if changed or isinstance(own, LNTuningConfig):
                # PiSSA, OLoRA: peft has changed the base; here the same initialization is subtracted from the update
                adapter = attach_config(self.model, own, name, cast=cast)
                try:
                    expected, (tensors, _) = tensors_of(adapter), read_safetensors(directory / WEIGHTS)
                    check_tensors(expected, tensors, directory / WEIGHTS)
                    fill(expected, tensors)
                except Exception:
                    detach(self.model, name)
                    raise
            else:
                adapter = load(self.model, directory, name, trainable=trainable, check_base=False)
            if not cast:
                to_base_dtype(self.model, adapter.side_paths())
        return own

    @contextmanager
    def _attaching(self, config: PeftConfig, name: str) -> Iterator[None]:
        """Check an adapter that the block attaches, then register it; if the block fails, restore the active ones."""
        if name in self.peft_config:
            raise AdapterError(f"Adapter with name '{name}' already exists. Please use a different name.")
        others = list(self.peft_config.values())
        if config.kind == "ADALORA" and not config.inference_mode and any(other.kind == "ADALORA" for other in others):
            raise AdapterError("AdaLoraModel supports only 1 trainable adapter. When using multiple adapters, set inference_mode to True.")
        if others and vars(config).get("bias", "none") != "none":
            raise AdapterError("peft supports only 1 adapter with bias. When using multiple adapters, set bias to 'none' for all adapters.")
        if any(other.is_prompt_learning != config.is_prompt_learning for other in others):
            raise AdapterError("one PeftModel cannot have a prompt and another kind of adapter", "byway.attach takes both")
        if self.has_merged_adapters():
            raise AdapterError("an adapter cannot be added to a merged model", "call unmerge_adapter() first")
        disabled = self.adapters_disabled()
        try:
            yield
        except Exception:
            self.sync_adapters()
            raise
        self.peft_config[name] = config
        heads = task_heads(config)
        if heads and "modules_to_save" in vars(config):
            own = vars(config)["modules_to_save"] or []
            vars(config)["modules_to_save"] = list(dict.fromkeys([*([own] if isinstance(own, str) else own), *heads]))
        self.set_adapter(self.active_adapters or name)
        if disabled:
            self.disable_adapter_layers()

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make exactly these adapters active and trainable; the others are frozen."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            self.check_adapter(name)
        self._check_rivals(names)
        if self.has_merged_adapters() and names != self.active_adapters:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=3)
            self._unmerge_all()
        self.active_adapters = names
        self.sync_adapters()
        for _, name, side in side_paths(self.model):
            side.requires_grad_(name in names and not inference_mode and not self.peft_config[name].inference_mode)

    def _check_rivals(self, names: Sequence[str], *, merging: bool = False) -> None:
        """Refuse several adapters that train one module whole, or rows of it; a merge may combine different rows."""
        for path, _, slot in slots(self.model):
            for kind, word in ((TrainedCopy, "ModulesToSaveWrapper"), (TrainedRows, "TrainableTokensWrapper")):
                rivals = {name for name, side in slot.sides() if name in names and isinstance(side, kind)}
                rows = [r for name, side in slot.sides() if name in rivals and isinstance(side, TrainedRows) for r in side.indices.tolist()]
                disjoint = merging and kind is TrainedRows and len(set(rows)) == len(rows)
                if len(rivals) > 1 and not disjoint:
                    raise AdapterError(f"Only one adapter can be set at a time for {word}; {path} has {sorted(rivals)}")

    def delete_adapter(self, adapter_name: str) -> None:
        """Detach an adapter; if no active one is left, the first of the others becomes active."""
        self.check_adapter(adapter_name)
        if any(adapter_name in layer.merged for layer in self.adapted_layers()):
            raise AdapterError(f"Cannot delete adapter(s) ['{adapter_name}'] while they are merged. Please unmerge them first.")
        adapted, disabled = self.adapted_layers(), self.adapters_disabled()
        detach(self.model, adapter_name)
        del self.peft_config[adapter_name]
        for layer in adapted:
            layer.scales.pop(adapter_name, None)
            if slot_of(layer.module) is None:
                undress(layer.module)
        if adapter_name in self.active_adapters:
            self.active_adapters = [name for name in self.active_adapters if name != adapter_name] or list(self.peft_config)[:1]
        if not self.peft_config:
            self.model.requires_grad_(False)  # detach restored the flags; peft leaves the base frozen
        elif self.has_merged_adapters():
            self.sync_adapters()
        else:
            self.set_adapter(self.active_adapters)
            if disabled:
                self.disable_adapter_layers()

    def enable_adapter_layers(self) -> None:
        self._switch(True)

    def disable_adapter_layers(self) -> None:
        self._unmerge_all()
        self._switch(False)

    def _switch(self, enabled: bool) -> None:
        for layer in self.adapted_layers():
            layer.disabled = not enabled
            layer.apply()
        for _, name, side in side_paths(self.model):
            side.requires_grad_(enabled and name in self.active_adapters and not self.peft_config[name].inference_mode)

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Within this context the bare base answers."""
        states = {layer.disabled for layer in self.adapted_layers()}
        if len(states) > 1:
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are disabled. This is most likely unintentional. "
                "After exiting the disable_adapter context, all adapters will be enabled",
                stacklevel=4,
            )
        flags = {id(p): p.requires_grad for _, _, side in side_paths(self.model) for p in side.parameters()}
        self.disable_adapter_layers()
        try:
            yield
        finally:
            if states != {True}:
                self.enable_adapter_layers()
                for _, _, side in side_paths(self.model):
                    for parameter in side.parameters():
                        parameter.requires_grad_(flags.get(id(parameter), parameter.requires_grad))

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train or freeze these adapters, active or not."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for _, name, side in side_paths(self.model):
            if name in names:
                side.requires_grad_(requires_grad)

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters (default: the active ones) until :meth:`unmerge_adapter`; all modules or none."""
        done: list[Layer] = []
        already = self.has_merged_adapters()
        self._check_mergeable(adapter_names or self.active_adapters)
        for layer in self.adapted_layers():
            before = bool(layer.merged)
            try:
                changed = layer.merge(adapter_names, safe=safe_merge)
            except Exception:
                for other in done:
                    other.unmerge()
                raise
            if changed and not before:
                done.append(layer)
        if not done and already and adapter_names is None:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=3)

    def _check_mergeable(self, names: Sequence[str]) -> None:
        for name in names:
            self.check_adapter(name)
            if self.peft_config[name].is_prompt_learning:
                raise NotMergeable(f"adapter {name!r} consists of virtual tokens, which cannot be folded into weights")

    def unmerge_adapter(self) -> None:
        """Undo every merge: the base's parameters are the original tensors again."""
        if not self.has_merged_adapters():
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
        self._unmerge_all()

    def _unmerge_all(self) -> None:
        for layer in self.adapted_layers():
            if layer.merged:
                layer.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Return the user's model with adapters (default: the active ones) merged into its weights for good.

        Raises:
            AdapterError: a merged weight would not be finite; the adapters before this one are merged already.
            NotMergeable: an adapter cannot be folded into weights.
        """
        names = list(self.active_adapters if adapter_names is None else adapter_names)
        self._unmerge_all()
        self._check_mergeable(names)
        self._check_rivals(names, merging=True)
        adapted = [path for path, module, _ in slots(self.model) if any(layer_of(module).mergeable(name) for name in names)]
        tied = next((path for path in adapted if tied_to(self.model, path)), None)
        if tied is not None:
            warnings.warn(f"Setting `tie_word_embeddings` to False: {tied} is merged and what was tied to it is not", stacklevel=3)
        for layer in self.adapted_layers():
            layer.active = []  # what reads a weight now gets the base's
        for name in names:
            try:
                merge(self.model, name)
            except AdapterError as error:
                raise broken(name) from error
        return self.unload()

    def unload(self) -> nn.Module:
        """Return the user's model without adapters."""
        self._unmerge_all()
        for name in list(adapters(self.model)):
            detach(self.model, name)
        for _, module in base_modules(self.model):
            undress(module)
        self.model.requires_grad_(False)
        self.forget_adapters()
        return self.model

    def forget_adapters(self) -> None:
        """Remove what peft's interface has recorded on the model."""
        for attribute in (_SESSION, "peft_config"):
            vars(self.model).pop(attribute, None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; AdaLoRA's penalty is added to a loss that it returns, as in peft."""
        out = self.model(*args, **kwargs)
        if isinstance(out, dict) and out.get("loss") is not None and (penalty := penalties(self.model)) is not None:
            out["loss"] = out["loss"] + penalty
        return out

    def update_and_allocate(self, global_step: int) -> None:
        """Allocate AdaLoRA's ranks after step `global_step` (from 1), before the gradients are cleared."""
        for name in self.active_adapters:
            config = self.peft_config[name]
            if isinstance(config, AdaLoraConfig) and config.total_step is not None:
                adapter = adapters(self.model)[name]
                adapter.method.after_step(adapter, global_step, config.total_step)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Any = "total",
    ) -> None:
        """Combine adapters into a new, frozen one.

        combination_type: ``cat`` (exact), ``svd``, ``linear``, ``ties``, ``dare_linear``, ``dare_ties``,
            ``magnitude_prune``, or one of the last four with ``_svd``, on the updates instead of the factors.
            (IA)³ vectors are summed with their weights.

        Raises:
            AdapterError: ranks differ where they must not, the type is unknown, or something has no weighted sum (the
                magnitudes of DoRA, a module that two adapters train whole). The model is unchanged.
        """
        if adapter_name in self.peft_config:
            return
        for name in adapters:
            self.check_adapter(name)
        combination = Combination(
            model=self.model,
            configs={name: self.peft_config[name] for name in adapters},
            weights=weights,
            kind=combination_type,
            svd_rank=svd_rank,
            density=density,
            sign=majority_sign_method,
            svd={"clamp": svd_clamp, "full_matrices": svd_full_matrices, "driver": svd_driver},
        )
        config = combination.config()
        self.attach_config(config, adapter_name)
        combination.fill(adapter_name)
        combination.shorten(config)
        self.set_requires_grad(adapter_name, False)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


def session_of(model: nn.Module) -> Session | None:
    """Return the session of a model that peft's interface has been used on."""
    return vars(model).get(_SESSION)


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    """Return key in peft's files → the adapter's own tensor, to be written into."""
    own = {key_of(site.path, name): tensor for site, side in adapter.side_paths() for name, tensor in destinations(side).items()}
    return peft_format(adapter.method).to_file(own)


def find_session(model: nn.Module) -> Session:
    """Return the session of a peft model, compiled or not, or of a model that an adapter was injected into."""
    for _, module in base_modules(model):
        found = session_of(module)
        if found is not None:
            return found
    raise AdapterError(f"{type(model).__name__} has no adapter of peft's interface", "call get_peft_model or inject_adapter_in_model first")
