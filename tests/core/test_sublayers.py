"""Sub-layers: on every family of the zoo, the listed outputs are what the model adds to its residual stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from byway.core.families.sublayers import layer_norms, sublayers
from byway.errors import TargetError
from tests import zoo

SCALED = ("granite", "granite unscaled", "beit")
"""Families that scale the output of a sub-layer before adding it to the residual stream."""


class Sums(TorchFunctionMode):
    """Records operands and result of every addition, by identity."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []
        self.sums: list[tuple[int, int, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.__name__ in ("add", "__add__", "__radd__", "add_", "__iadd__") and len(args) == 2 and isinstance(args[1], Tensor):
            self.kept.append((args, out))
            self.sums.append((id(args[0]), id(args[1]), id(out)))
        return out


class Seen:
    """The inputs and outputs of each module, by identity."""

    def __init__(self, model: nn.Module) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self.outputs: dict[str, list[Tensor]] = {}
        for path, module in model.named_modules():
            module.register_forward_hook(lambda m, a, k, out, path=path: self.note(path, a, k, out), with_kwargs=True)

    def note(self, path: str, args: Any, kwargs: Any, out: Any) -> None:
        given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        first = out[0] if isinstance(out, tuple) else out
        if given is not None and isinstance(first, Tensor):
            self.inputs.setdefault(path, []).append(given)
            self.outputs.setdefault(path, []).append(first)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_what_is_listed_is_what_the_model_adds(name: str) -> None:
    model = zoo.build(name)
    parts = sublayers(model)
    seen, sums = Seen(model), Sums()
    with torch.no_grad(), sums:
        model(**zoo.inputs(model))
    added = {operand for one, other, _ in sums.sums for operand in (one, other)}
    for part in parts:
        outputs = seen.outputs[part.output]
        modules = dict(model.named_modules())
        assert outputs[0].shape[-1] == part.width(modules), part
        if name not in SCALED:
            assert all(id(out) in added for out in outputs), part
        results = {total for one, other, total in sums.sums if {one, other} & {id(out) for out in outputs}}
        if part.norm is not None:
            assert {id(x) for x in seen.inputs[part.norm]} & results, part
            assert part.residual is None
        if part.residual is not None:
            pairs = {frozenset((one, other)) for one, other, _ in sums.sums}
            for x, z in zip(seen.inputs[part.residual], outputs, strict=True):
                assert frozenset((id(x), id(z))) in pairs, part
        if part.role == "feed-forward":
            assert part.entry is not None
            assert part.entry in seen.inputs


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_layer_has_its_sublayers_and_no_site_is_called_twice(name: str) -> None:
    model = zoo.build(name)
    parts = sublayers(model)
    seen = Seen(model)
    with torch.no_grad():
        model(**zoo.inputs(model))
    assert len({part.output for part in parts}) == len(parts)
    for layer in {part.layer for part in parts}:
        roles = [part.role for part in parts if part.layer == layer]
        assert "attention" in roles
        assert roles.count("feed-forward") == 1
    runs = {len(seen.outputs[part.layer]) for part in parts if part.layer in seen.outputs}
    for part in parts:
        if part.layer in seen.outputs:
            assert len(seen.outputs[part.output]) == len(seen.outputs[part.layer]), (part, runs)


def test_post_norm_follows_the_configuration() -> None:
    from transformers import OPTConfig, OPTModel

    sizes = {
        "vocab_size": 20,
        "hidden_size": 16,
        "ffn_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    }
    for before in (True, False):
        parts = sublayers(OPTModel(OPTConfig(**sizes, do_layer_norm_before=before)))
        assert [part.norm is None for part in parts] == [before, before]
        assert [part.residual is None for part in parts] == [not before, not before]


def test_norms_of_queries_and_keys_count_and_norms_without_numbers_do_not() -> None:
    assert sum("q_norm" in path for path in layer_norms(zoo.shared("qwen3"))) == 2
    assert layer_norms(zoo.shared("olmo")) == ()


def test_an_unknown_structure_is_refused_with_what_to_do() -> None:
    with pytest.raises(TargetError, match="cannot be told from its structure"):
        sublayers(nn.Sequential(nn.Linear(2, 2)))
