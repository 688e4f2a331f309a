"""peft's ``LoraModel`` and its like, the module between a PeftModel and the user's model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from byway.compat.peft.config import AdaLoraConfig, PeftConfig
from byway.compat.peft.session import Session
from byway.compat.peft.types import PeftType
from byway.core.adapter import adapters
from byway.core.slots import penalties, side_paths

__all__ = ["Tuner"]

_PREFIXES: Mapping[str, str] = {PeftType.LORA: "lora_", PeftType.ADALORA: "lora_", PeftType.IA3: "ia3_", PeftType.LN_TUNING: "ln_tuning_"}


class Tuner(nn.Module):
    """peft's ``LoraModel`` and its like: what stands between the PeftModel and the user's model."""

    def __init__(self, model: nn.Module, session: Session) -> None:
        super().__init__()
        self.model = model
        self.session = session

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self.session.configs

    @property
    def prefix(self) -> str:
        """How the names of this method's tensors begin."""
        first = next(iter(self.session.configs.values()), None)
        return _PREFIXES[str(first.peft_type)] if first is not None else "lora_"

    @property
    def active_adapter(self) -> str | list[str]:
        active = self.session.active
        return active[0] if len(active) == 1 else list(active)

    @property
    def active_adapters(self) -> list[str]:
        return list(self.session.active)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make exactly these adapters active; several are allowed here."""
        self.session.set_active(adapter_name, inference_mode=inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward; to a loss that it computes itself AdaLoRA's penalty is added, as in peft."""
        out = self.model(*args, **kwargs)
        if isinstance(out, dict) and out.get("loss") is not None and (penalty := penalties(self.session.model)) is not None:
            out["loss"] = out["loss"] + penalty
        return out

    def update_and_allocate(self, global_step: int) -> None:
        """AdaLoRA's allocation of ranks after step `global_step` (from 1), while the gradients are there; nothing for other methods."""
        for name in self.session.active:
            config = self.session.configs[name]
            if isinstance(config, AdaLoraConfig) and config.total_step is not None:  # one without is refused when it is made
                adapter = adapters(self.session.model)[name]
                adapter.method.after_step(adapter, global_step, config.total_step)

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Merge so that it can be taken back."""
        self.session.merge(adapter_names, safe=safe_merge)

    def unmerge_adapter(self) -> None:
        """Take every merge back; the base is the very tensors it was."""
        self.session.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """The user's model with adapters (default: the active ones) in its weights."""
        return self.session.unload(adapter_names, merge=True, safe=safe_merge)

    def unload(self) -> nn.Module:
        """The user's model as it was."""
        return self.session.unload(merge=False)

    def delete_adapter(self, adapter_name: str) -> None:
        self.session.delete(adapter_name)

    def disable_adapter_layers(self) -> None:
        self.session.enable(False)

    def enable_adapter_layers(self) -> None:
        self.session.enable(True)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train these adapters' tensors, or do not; which are active is another matter."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for _, name, side in side_paths(self.model):
            if name in names:
                side.requires_grad_(requires_grad)

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, **options: Any) -> None:
        """A new adapter that combines others; :func:`byway.compat.peft.weighted.add_weighted_adapter` lists the options."""
        from byway.compat.peft.weighted import add_weighted_adapter

        add_weighted_adapter(self.session, adapters, weights, adapter_name, **options)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("model", "session"):
                raise
            return getattr(self.model, name)
