"""Side paths that only files need: a weight replaced by the file's (a vocabulary resized before training), and several at one site."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from byway.slots import SidePath, base_modules

__all__ = ["ReplacedWeight", "Together"]


class ReplacedWeight(SidePath):
    """y = f(x; W'): the module answers with the weight W' (and bias) of a file; W' is a buffer, so it is saved and never trained."""

    def __init__(self, module: nn.Module, tensors: Mapping[str, Tensor], *, exported: bool = True) -> None:
        super().__init__()
        twin = copy.deepcopy(module)
        for _, part in base_modules(twin):
            part._modules.pop("byway", None)
            part.__dict__.pop("forward", None)
            part._forward_hooks.clear()
            part._forward_pre_hooks.clear()
        for name, parameter in list(twin._parameters.items()):
            if parameter is not None:
                del twin._parameters[name]
                value = tensors[name].to(parameter.dtype).to(parameter.device) if name in tensors else parameter.detach()
                twin.register_buffer(name, value.clone())
        self.copy = twin
        # what is tied to a replaced weight follows it and is not written a second time
        self.peft_names = {f"copy.{name}": f"base_layer.{name}" for name in tensors} if exported else {}

    def instead(self, module: nn.Module, inputs: dict[str, Any]) -> Any:
        return self.copy(**inputs)

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        own = dict(self.copy.named_buffers())
        return {name: own[name].to(tensor.dtype).clone() if name in own else tensor for name, tensor in tensors.items()}


class Together(SidePath):
    """Several side paths of one adapter at one site, as one: each verb goes through them in order; at most one answers ``instead``."""

    def __init__(self, sides: Sequence[SidePath]) -> None:
        super().__init__()
        self.sides = tuple(sides)
        for number, side in enumerate(sides):
            self.add_module(str(number), side)

    def overrides(self, verb: str) -> bool:
        return any(side.overrides(verb) for side in self.sides)

    def before(self, inputs: dict[str, Any]) -> dict[str, Any]:
        for side in self.sides:
            inputs = side.before(inputs)
        return inputs

    def after(self, inputs: dict[str, Any], out: Any) -> Any:
        for side in self.sides:
            out = side.after(inputs, out)
        return out

    def instead(self, module: nn.Module, inputs: dict[str, Any]) -> Any:
        return next(side for side in self.sides if side.overrides("instead")).instead(module, inputs)

    def fold(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for side in self.sides:
            tensors = side.fold(tensors)
        return tensors

    def penalty(self) -> Tensor | None:
        found = [penalty for side in self.sides if (penalty := side.penalty()) is not None]
        return sum(found[1:], found[0]) if found else None

    def export(self) -> dict[str, Tensor]:
        return {name: tensor for side in self.sides for name, tensor in side.export().items()}
