"""Wrong scales on purpose: the effect of each side path is multiplied by 1.5. Every cell must notice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from byway.core.adapter import Adapter
from byway.core.copies import TrainedCopy
from byway.core.slots import SidePath
from byway.methods.bottleneck.sides import Tap as BottleneckTap
from byway.methods.ladder.network import Ladder
from byway.methods.ladder.taps import Tap
from byway.methods.virtual.sides import Answers, EncoderStates, VirtualTokens

FACTOR = 1.5
_ONLY_READ = (Tap, BottleneckTap, Answers, EncoderStates)
_SOURCES: Mapping[type, str] = {VirtualTokens: "vectors", Ladder: "climb"}
"""Side paths that change the sequence length or replace the output → the function that computes the new part."""


def wrong_scale(adapter: Adapter) -> None:
    """Multiply the effect of every side path of `adapter` by 1.5, on these objects only."""
    sides = [side for _, side in adapter.side_paths()]
    alone = all(isinstance(side, TrainedCopy) for side in sides)
    mutated = 0
    for side in sides:
        if isinstance(side, _ONLY_READ) or (isinstance(side, TrainedCopy) and not alone):
            continue  # it changes nothing itself, or it is a task head next to the method's own side paths
        source = next((name for kind, name in _SOURCES.items() if isinstance(side, kind)), None)
        if source is not None:
            vars(side)[source] = _scaled(getattr(side, source))
            mutated += 1
            continue
        for verb, mutate in _MUTATIONS.items():
            if side.overrides(verb):
                vars(side)[verb] = mutate(side)
                mutated += 1
    if not mutated:
        raise AssertionError("nothing was mutated")


def _scaled(plain: Any) -> Any:
    return lambda *args: FACTOR * plain(*args)


def _overdone(before: Any, after: Any) -> Any:
    """Return before + 1.5·(after − before), for a tensor or the first element of a tuple."""
    if isinstance(after, Tensor):
        return before + FACTOR * (after - before)
    return (_overdone(before[0], after[0]), *after[1:])


def _after(side: SidePath) -> Any:
    plain = side.after
    # a side path may write into its input
    return lambda inputs, out: _overdone(out, plain(inputs, out.clone() if isinstance(out, Tensor) else out))


def _before(side: SidePath) -> Any:
    plain = side.before

    def before(inputs: dict[str, Any]) -> dict[str, Any]:
        out = plain(dict(inputs))
        return out | {k: _overdone(inputs[k], v) for k, v in out.items() if _comparable(inputs.get(k), v)}

    return before


def _comparable(old: Any, new: Any) -> bool:
    return isinstance(old, Tensor) and isinstance(new, Tensor) and old.shape == new.shape and new.is_floating_point()


def _attend(side: SidePath) -> Any:
    plain = side.attend

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None) -> Any:
        keys, values, mask, bias = plain(query, key, value, mask, bias)
        own = values.shape[2] - value.shape[2]
        return keys, torch.cat([FACTOR * values[:, :, :own], values[:, :, own:]], dim=2), mask, bias

    return attend


def _instead(side: SidePath) -> Any:
    plain = side.instead

    def instead(module: Any, inputs: dict[str, Any]) -> Any:
        out = plain(module, inputs)
        return FACTOR * out if isinstance(out, Tensor) else out

    return instead


_MUTATIONS = {"after": _after, "before": _before, "attend": _attend, "instead": _instead}
