"""A method that is not part of the package: y = f(x)·(1 + g), with one trained gain g per output feature of a linear
map.

A recipe names it by import path, ``method: {name: "toy_method:Scale"}``, with this folder on PYTHONPATH. Commands that
read the finished run import it with ``--allow-import`` only: ``byway generate RUN --allow-import --prompt ...``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from byway import Method, SidePath, Site
from byway.core import BuildContext, Placement
from byway.core.targets.resolve import resolve
from byway.core.weights import device_of, features, is_transposed


@dataclass(frozen=True, kw_only=True)
class Scale(Method):
    """Scale the outputs of linear maps; one trainable parameter per output feature."""

    targets: str | tuple[str, ...] | None = None
    """Which linear maps, as in every method; null: chosen by architecture."""

    mergeable: ClassVar[bool] = True

    def plan(self, model: nn.Module) -> Placement:
        return Placement(resolve(model, self.targets))

    def build(self, site: Site, model: nn.Module, context: BuildContext) -> SidePath:
        return OutputScale(site.module)


class OutputScale(SidePath):
    """y = f(x)·(1 + g), g (out,) from zero, so that attaching changes nothing."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(features(module)[1], device=device_of(module)))
        self.columns = is_transposed(module)  # GPT-2 keeps its weights as (in, out)

    def after(self, inputs: dict[str, Any], out: Tensor) -> Tensor:
        return out * (1 + self.gain).to(out.dtype)

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        factor = (1 + self.gain.detach()).to(tensors["weight"].dtype)
        return {name: t * (factor if self.columns or name == "bias" else factor[:, None]) for name, t in tensors.items()}
