r"""Layer-norm tuning: y = γ'∘(x − μ)/σ + β', or y = γ'∘x/rms(x) for an RMS norm; γ' and β' start as the base's γ and β.

::

    x ──┬── norm (γ, β frozen)          not run while the adapter is active
        └── its copy (γ', β') ──── y

Every norm is trained as a copy that runs in its place, whatever its class computes (Gemma's 1 + γ, T5's no mean).

Source: Zhao et al., arXiv 2312.11420 §3; ``LN_TUNING`` in HF peft.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from byway.core.copies import Copy, tied_note, tied_to
from byway.core.fields import Layers, Names
from byway.core.method import Attached, BuildContext, Method, Placement, without_weight_decay
from byway.core.peft_format import PeftFormat
from byway.core.slots import SidePath, Site, base_modules
from byway.core.targets.resolve import resolve
from byway.core.weights import is_norm
from byway.errors import TargetError

__all__ = ["LayerNormTuning", "NormCopy"]


class _LayerNormPeftFormat(PeftFormat["LayerNormTuning"]):
    def fields(self, method: LayerNormTuning) -> dict[str, Any]:
        return {}

    def method(self, kind: type[LayerNormTuning], config: Mapping[str, Any]) -> LayerNormTuning:
        return kind(targets=config.get("target_modules"), modules_to_save=tuple(config.get("modules_to_save") or ()) or "none")


@dataclass(frozen=True, kw_only=True)
class LayerNormTuning(Method):
    """The norms, trained in full: d or 2d trainable parameters for each norm of width d.

    Attaching leaves the output unchanged. The norms have no weight decay. Two such adapters cannot be active at once.

    Raises:
        ConfigError: an empty list of targets.
        TargetError: something named is not in the model or is not a norm with a weight, or the model has none.
    """

    targets: Names | None = None
    """Norms to train: a regular expression, or a list of names; null: all, including those of queries and keys and the
    last one."""
    exclude: str | Sequence[str] | None = None
    """Modules to leave out, written like `targets`."""
    layers: Layers | None = None
    """Layers to adapt, counted within each stack: indices, ranges such as ``16-``, or ``language-model``
    (those of a vision-language model's decoder); null: all."""

    peft = _LayerNormPeftFormat("LN_TUNING")
    mergeable: ClassVar[bool] = True

    def plan(self, model: nn.Module) -> Placement:
        usual = [path for path, module in base_modules(model) if path and is_norm(module)]
        if not usual:
            raise TargetError(f"{type(model).__name__} has no norm with a weight", "choose another method")
        sites = resolve(model, self.targets, exclude=self.exclude, layers=self.layers, accepts=is_norm, usual=usual)
        trained = {site.path for site in sites}
        untied = [site for site in sites if not trained.issuperset(tied_to(model, site.path))]
        return Placement(sites, [tied_note(model, site) for site in untied])

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        return NormCopy(site.module, context.shared)

    def param_groups(self, adapter: Attached, learning_rate: float) -> list[dict[str, Any]]:
        """Return groups without weight decay for the norms."""
        return without_weight_decay(adapter, learning_rate, NormCopy)


class NormCopy(Copy):
    """y = norm(x; γ', β'): the copy of one norm."""

    def export(self) -> dict[str, Tensor]:
        return {f"ln_tuning_layers.{name}": tensor for name, tensor in self.copy.state_dict().items()}
