"""Check that adapters let the gradient pass: with the update still zero, it reaches the input as in the bare base.

An adapter can leave every output unchanged and still cut the graph (by a write in place into the output of a custom
autograd function): then whatever is below trains on wrong gradients, and nothing else shows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from byway.core.attach import disabled
from byway.core.families import facts, input_embedding
from byway.core.slots import side_paths
from byway.core.weights import widened
from byway.errors import TargetError
from byway.train.levers.lever import Loss
from byway.train.levers.prove import OF_GRADIENTS, at_work

__all__ = ["check_upstream", "compare_upstream"]

_SAME = 1e-6
"""Relative difference of outputs up to which the update counts as zero."""


def check_upstream(model: nn.Module, loss: Loss, batch: Mapping[str, Any]) -> None:
    """Compare with the bare base, in training mode with fixed draws.

    Raises:
        TargetError: the gradient differs although the loss is the same; the message names the lowest layer above which
            it is right.
    """
    wrong = compare_upstream(model, loss, batch)
    if wrong:
        raise TargetError(wrong, "leave modules of that layer out (method.exclude), and please report it: byway doctor shows it too")


def compare_upstream(model: nn.Module, loss: Loss, batch: Mapping[str, Any]) -> str:
    """Return what is wrong; ``""`` if nothing is, or if it cannot be told: the update is not zero, no token is read."""
    embedding = input_embedding(model)
    if embedding is None or any(side.detached for _, _, side in side_paths(model)):
        return ""
    dtype = torch.float32 if widened(model) else next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    places = [embedding, *(layer for layers in facts(model).stacks.values() for layer in layers)]
    with at_work(model):
        outputs, gradients = _computed(model, places, loss, batch)
        with disabled(model):
            bare, expected = _computed(model, places, loss, batch)
    if outputs.keys() != bare.keys() or any(_apart(outputs[path], bare[path]) > _SAME for path in bare):
        return ""
    wrong = [path for path in bare if _apart(gradients[path], expected[path]) > OF_GRADIENTS[dtype]]
    if embedding not in wrong:
        return ""
    above = places.index(wrong[-1]) + 1
    return (
        f"the update of the adapter is still zero, but the gradient that reaches {embedding} is off by "
        f"{_apart(gradients[embedding], expected[embedding]):.1%} from the bare base's: "
        f"it is lost {f'in {places[above]}' if above < len(places) else f'above {wrong[-1]}'}"
    )


def _apart(own: Tensor, expected: Tensor) -> float:
    if own.shape != expected.shape:  # virtual tokens
        return float("inf")
    whole = float(expected.double().norm())
    return float((own.double() - expected.double()).norm()) / whole if whole > 0 else float(own.double().norm())


def _computed(model: nn.Module, places: list[str], loss: Loss, batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the outputs of those of `places` that run, and the gradients of the loss with respect to them."""
    with _collected(model, places) as outputs:
        total, _ = loss(model, batch, labels_only=False)
    found = torch.autograd.grad(total, list(outputs.values()), allow_unused=True)
    gradients = {path: torch.zeros_like(outputs[path]) if g is None else g for path, g in zip(outputs, found, strict=True)}
    return {path: output.detach() for path, output in outputs.items()}, gradients


@contextmanager
def _collected(model: nn.Module, places: list[str]) -> Iterator[dict[str, Tensor]]:
    """Within this context, collect the output of each place; that of an embedding requires a gradient."""
    outputs: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for path in places:

            def collect(module: nn.Module, args: Any, out: Any, path: str = path) -> Any:
                tensor = out[0] if isinstance(out, tuple) else out
                if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or path in outputs:
                    return out
                outputs[path] = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
                passed = outputs[path].clone()  # a model may change it in place, which a leaf forbids
                return (passed, *out[1:]) if isinstance(out, tuple) else passed

            stack.callback(model.get_submodule(path).register_forward_hook(collect).remove)
        yield outputs
