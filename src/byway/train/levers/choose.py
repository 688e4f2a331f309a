"""Decide which levers a run uses: those that apply, are allowed, save enough, and pass the test on a probe."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from byway.core.families import attention_windows
from byway.core.registry import Registry
from byway.data.encode import Example
from byway.engine.shared_prefix import Sharing
from byway.tasks.task import Task, moved
from byway.train import randomness
from byway.train.levers.engaged import Engaged
from byway.train.levers.lever import Lever, Probe, Setting, Wish
from byway.train.levers.prove import plainly, prove, refuse, reproduces

if TYPE_CHECKING:
    from torch import nn

    from byway.recipe.recipe import Recipe

__all__ = ["choose", "choose_last", "keys", "levers", "probe_rows"]

_REGISTRY: Registry[Lever] = Registry(
    sys.modules["byway.train.levers"],
    "lever",
    "byway.train.levers.lever:Lever",
    apart=("cache", "choose", "engaged", "lever", "prove"),
)

PROBE_TOKENS = (16, 24, 32)
"""Tokens kept of each row of the probe: before it begins, a run spends two or three passes on them."""
WINDOW = 160
"""Attention windows up to this length are exceeded by one row of the probe."""


def levers(own: Sequence[str] = ()) -> tuple[Lever, ...]:
    """The levers of this package and those at the import paths `own`, in the order in which they act.

    Raises:
        ConfigError: an import path does not lead to a lever.
    """
    classes = [_REGISTRY.load(name) for name in (*_REGISTRY.names(), *own)]
    return tuple(sorted((cls() for cls in classes), key=lambda lever: lever.place))


def keys(own: Sequence[str] = ()) -> tuple[str, ...]:
    """The keys of :func:`levers`, for the plan line."""
    return tuple(lever.key for lever in levers(own))


def choose(model: nn.Module, task: Task[Any], examples: Sequence[Any], recipe: Recipe, micro_tokens: int) -> tuple[Engaged, Setting]:
    """Test the levers that apply and are allowed on pieces of a few rows; all but those that need the planned steps.

    Returns the levers that are on, and the setting for :func:`choose_last`.

    Raises:
        ConfigError: a lever that is ``on`` does not apply, or does not reproduce the plain loss.
    """
    engine = recipe.engine
    there = levers(engine.levers)
    setting = Setting(
        model=model,
        task=task,
        examples=examples,
        engine=engine,
        train=recipe.train,
        probe=Probe((), {}, plain={}),
        micro_tokens=micro_tokens,
    )
    first = [lever for lever in there if lever.stage == "first"]
    wishes: dict[str, Wish] = {lever.key: lever.wish(engine) for lever in there}
    cannot = {lever.key: why for lever in first if (why := lever.cannot(setting, Engaged()))}
    packs = "pack" not in cannot and wishes["pack"] != "off"
    alike: list[Any] = []
    if packs and wishes["share_prefix"] != "off" and task.language_model and all(isinstance(example, Example) for example in examples):
        alike = [examples[place] for place in Sharing(examples).closest(2)]  # two rows that share a prefix, if there are any
    rows = probe_rows(task, examples, alike, reach=max((w for w in attention_windows(model) if w <= WINDOW), default=0))
    device = next(model.parameters()).device
    padded = moved(task.collate(rows), device)
    with randomness.preserved():
        probe = Probe(rows, padded, plainly(model, padded, loss=task.loss), bool(alike))
        setting = replace(setting, probe=probe)
        engaged = prove(
            model,
            first,
            lambda engaged: engaged.batch(task, rows, device),
            wishes,
            loss=task.loss,
            cannot=cannot,
            plain=probe.plain,
        )
    return _decided("packed", setting, engaged), setting


def choose_last(setting: Setting, engaged: Engaged, *, tokens: float, cached: bool) -> Engaged:
    """Decide the levers whose worth depends on planned steps and cache. Raises ConfigError as :func:`choose`."""
    return _decided("last", replace(setting, tokens=tokens, cached=cached), engaged)


def _decided(stage: Literal["packed", "last"], setting: Setting, engaged: Engaged) -> Engaged:
    """`engaged` with each lever of `stage` on, in the first way that saves enough and passes the test, or off."""
    task, probe, device = setting.task, setting.probe, next(setting.model.parameters()).device
    for lever in levers(setting.engine.levers):
        if lever.stage != stage:
            continue
        wish = lever.wish(setting.engine)
        reason = "switched off" if wish == "off" else lever.cannot(setting, engaged)
        for saving in () if reason else lever.savings(setting, engaged):
            if wish == "auto" and saving.share < lever.worth:
                reason = f"{saving.share:.1%} {saving.of} is not worth it"
                break
            with randomness.preserved():
                reason = saving.lever.fails(setting)
                if not reason:
                    trial = engaged.with_lever(saving.lever)
                    batch = trial.batch(task, probe.rows, device)
                    reason = reproduces(setting.model, batch, trial, loss=task.loss, plain=probe.plain)
            if not reason:
                engaged = engaged.with_lever(saving.lever, saving.words)
                break
        if reason or not engaged.has(lever.key):
            engaged = refuse(engaged, lever.key, wish, reason)
    return engaged


def probe_rows(task: Task[Any], examples: Sequence[Any], alike: Sequence[Any] = (), reach: int = 0) -> list[Any]:
    """Pieces of as many rows as :data:`PROBE_TOKENS`, of different lengths if possible: padding and packing matter.

    `alike`: rows to take first. `reach`: the longest piece is longer than this.
    """
    labelled = [e for e in examples if task.labels(e) > 0] or list(examples)
    usable = sorted((e for e in labelled if task.length(e) >= 4), key=task.length) or labelled
    spread = [usable[0], usable[-1], usable[len(usable) // 2]]
    chosen = list(alike)
    while len(chosen) < len(PROBE_TOKENS):
        rest = [e for e in spread if all(e is not one for one in chosen)]
        if not rest:
            break
        lengths = {task.length(one) for one in chosen}
        chosen.append(next((e for e in rest if task.length(e) not in lengths), rest[0]))
    room = [*PROBE_TOKENS[:-1], max(PROBE_TOKENS[-1], reach + 8 if reach else 0)][-len(chosen) :]
    return [task.cut(e, tokens) for e, tokens in zip(sorted(chosen, key=task.length), room, strict=True)]
