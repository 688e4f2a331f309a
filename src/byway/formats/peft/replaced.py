"""A side path that only files need: a weight replaced by the file's (a vocabulary that was resized before training)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from byway.core.copies import bare_copy
from byway.core.slots import SidePath

__all__ = ["ReplacedWeight"]


class ReplacedWeight(SidePath):
    """y = f(x; W'): the module with the weight W' (and bias) of a file, a buffer: saved, never trained."""

    def __init__(self, module: nn.Module, tensors: Mapping[str, Tensor], *, exported: bool = True) -> None:
        super().__init__()
        twin = bare_copy(module)
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
