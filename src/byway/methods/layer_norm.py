r"""Layer-norm tuning: y = γ'∘(x − μ)/σ + β', with γ' and β' trained from the base's γ and β; y = γ'∘x/rms(x) where the norm is an RMS norm.

::

    x ──┬── norm (γ, β frozen)          not run while the adapter is active
        └── its copy (γ', β') ──── y

Every norm of the model is trained as a copy that answers in its place, whatever its class computes (Gemma's 1 + γ, T5's without a mean).

Source: Zhao et al., arXiv 2312.11420 §3; in HF peft ``LN_TUNING``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from byway.core.copies import Copy
from byway.core.method import BuildContext, Method
from byway.core.slots import SidePath, Site, base_modules
from byway.core.weights import is_norm
from byway.errors import ConfigError, TargetError

if TYPE_CHECKING:
    from byway.core.method import Attached

__all__ = ["LayerNormTuning", "NormCopy"]


@dataclass(frozen=True, kw_only=True)
class LayerNormTuning(Method):
    """The norms, trained whole: d or 2d numbers for each of width d.

    Attaching leaves the output as it is. Weight decay is not applied to the norms. Two such adapters cannot be active at once.

    Raises:
        ConfigError: an empty list of targets.
        TargetError: something named is not in the model or is no norm with a weight, or the model has none.
    """

    targets: str | Sequence[str] | None = None
    """Which norms, by name or regular expression; none: every one, those of queries and keys and the last one too."""
    exclude: str | Sequence[str] | None = None
    """Modules to leave out, written like `targets`."""
    layers: str | int | Sequence[int | str] | None = None
    """Layers to adapt, counted per stack: indices, or ranges such as ``16-``."""

    peft_type: ClassVar[str | None] = "LN_TUNING"
    mergeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets is not None and not self.targets:
            raise ConfigError("targets is empty: nothing would be trained", "leave it out for every norm")

    def sites(self, model: nn.Module) -> Iterator[Site]:
        from byway.core.targets.resolve import resolve

        usual = [path for path, module in base_modules(model) if path and is_norm(module)]
        if not usual:
            raise TargetError(f"{type(model).__name__} has no norm with a weight", "choose another method")
        yield from resolve(model, self.targets, exclude=self.exclude, layers=self.layers, accepts=is_norm, usual=usual)

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        return NormCopy(site.module)

    def param_groups(self, adapter: Attached, learning_rate: float) -> list[dict[str, Any]]:
        """The norms without weight decay, then what is trained whole (heads)."""
        norms = {id(p) for _, side in adapter.side_paths() if isinstance(side, NormCopy) for p in side.parameters()}
        parameters = [p for _, p in adapter.named_parameters()]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if id(p) in norms], "lr": learning_rate, "weight_decay": 0.0},
            {"params": [p for p in parameters if id(p) not in norms], "lr": learning_rate},
        ]
        return [group for group in groups if group["params"]]

    def to_peft(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> LayerNormTuning:
        return cls(targets=config.get("target_modules"), modules_to_save=tuple(config.get("modules_to_save") or ()) or "none")


class NormCopy(Copy):
    """y = norm(x; γ', β'): the copy of one norm."""

    def export(self) -> dict[str, Tensor]:
        return {f"ln_tuning_layers.{name}": tensor for name, tensor in self.copy.state_dict().items()}
