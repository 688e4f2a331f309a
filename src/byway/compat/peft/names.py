"""peft's names for the tensors of a model whose own keys do not change.

``lin.weight`` → ``lin.base_layer.weight`` if side paths are attached to it; ``lin.byway.default.lora_A`` →
``lin.lora_A.default.weight``; ``head.byway.default.copy.weight`` → ``head.modules_to_save.default.weight``, and the
base's own head → ``head.original_module.weight``; side paths of the whole model → ``prompt_encoder.default…``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from byway.core.copies import Copy, TrainedBias, TrainedCopy, TrainedRows
from byway.core.slots import SLOT, SidePath, slots

__all__ = ["first_parts", "peft_names"]

_OF_SIDE_PATH = re.compile(rf"((?:.*?\.)?{SLOT}\.[^.]+\.)(.*)")
_LIVE = {"lora_magnitude_vector": "lora_magnitude_vector.weight"}
"""Names that peft shortens in files: name in a file → name in a module."""


def _patterns(side: SidePath) -> dict[str, str]:
    """Return own tensor name → name in peft's modules, with ``{}`` in the place of the adapter's name."""
    if isinstance(side, Copy):
        # in files a copy has the module's own names, or another word before them (a norm's)
        word = "modules_to_save" if isinstance(side, TrainedCopy) else next(iter(side.export())).partition(".")[0]
        return {f"copy.{own}": f"{word}.{{}}.{own}" for own in side.copy.state_dict()}
    if isinstance(side, TrainedRows):
        return {"rows": "token_adapter.trainable_tokens_delta.{}"}
    parts = {own: _LIVE.get(theirs, theirs).partition(".") for own, theirs in side.peft_names.items()}
    return {} if isinstance(side, TrainedBias) else {own: f"{head}.{{}}{dot}{rest}" for own, (head, dot, rest) in parts.items()}


def first_parts(side: SidePath) -> dict[str, list[tuple[str, str]]]:
    """Return attribute of peft's layer → [(name of the tensor below it, own name)] for the tensors that `side` has."""
    found: dict[str, list[tuple[str, str]]] = {}
    existing = {name for name, _ in (*side.named_parameters(), *side.named_buffers())}
    for own, pattern in () if isinstance(side, TrainedCopy | TrainedRows) else _patterns(side).items():
        if own in existing:
            head, _, rest = pattern.partition(".{}")
            found.setdefault(head, []).append((rest.lstrip("."), own))
    return found


def peft_names(model: nn.Module, keys: Iterable[str], prefix: str) -> dict[str, str]:
    """Return own key → peft's key for each of `keys`; `prefix` precedes all but those of side paths of the whole model.

    A trained bias has the key of the base's own bias, which is left out.
    """
    sides: dict[str, tuple[str, str, SidePath]] = {}
    inserted: dict[str, str] = {}
    hidden: set[str] = set()
    for path, _, slot in slots(model):
        dotted = f"{path}." if path else ""
        own = [side for _, side in slot.sides()]
        sides |= {f"{dotted}{SLOT}.{key}.": (path, name, side) for key, name, side in slot.entries()}
        hidden |= {f"{dotted}bias" for side in own if isinstance(side, TrainedBias)}
        if path and any(map(first_parts, own)):
            inserted[path] = "base_layer"
        elif path and any(isinstance(side, TrainedCopy | TrainedRows) for side in own):
            inserted[path] = "original_module"
    is_prompt = prefix == "base_model."
    matches = {key: _OF_SIDE_PATH.fullmatch(key) for key in keys}
    owners = [sides[match[1]] for match in matches.values() if match is not None]
    several = len({path for path, _, side in owners if not isinstance(side, TrainedCopy)}) > 1
    found: dict[str, str] = {}
    for key, match in matches.items():
        if match is not None:
            (path, name, side), own_name = sides[match[1]], match[2]
            if not path or (is_prompt and not isinstance(side, TrainedCopy)):
                # the path only where several modules have virtual tokens
                parts = ("prompt_encoder", name, path if is_prompt and several else "", own_name)
                found[key] = ".".join(part for part in parts if part)
            elif isinstance(side, TrainedBias):
                found[key] = prefix + ".".join((path, inserted[path], "bias") if path in inserted else (path, "bias"))
            else:
                found[key] = f"{prefix}{path}." + _patterns(side).get(own_name, f"{SLOT}.{{}}.{own_name}").format(name)
        elif key not in hidden:
            parts = key.split(".")
            words = [inserted.get(".".join(parts[: n + 1])) if n + 1 < len(parts) else None for n in range(len(parts))]
            found[key] = prefix + ".".join(text for pair in zip(parts, words, strict=True) for text in pair if text)
    return found
