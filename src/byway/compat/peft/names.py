"""Names of parameters and state-dict keys as peft has them, over a model whose own keys do not change.

``lin.weight`` → ``lin.base_layer.weight`` where side paths hang beside it, ``lin.byway.default.lora_A`` → ``lin.lora_A.default.weight``,
``head.byway.default.copy.weight`` → ``head.modules_to_save.default.weight`` and the base's own head → ``head.original_module.weight``,
what hangs on the whole model → ``prompt_encoder.default…``.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from byway.compat.peft.layers import first_parts, shown
from byway.core.copies import TrainedBias, TrainedCopy, TrainedRows
from byway.core.slots import SLOT, SidePath, slots

__all__ = ["peft_names"]


def peft_names(model: nn.Module, keys: Iterable[str], prefix: str) -> dict[str, str]:
    """Own key in `model` → what peft would call it, for each of `keys`; `prefix` goes before all but those of the whole model.

    A trained bias stands where peft has it, in the place of the base's own, which is left out.
    """
    sides: dict[str, tuple[str, str, SidePath]] = {}
    inserted: dict[str, str] = {}
    hidden: set[str] = set()
    for path, _, slot in slots(model):
        dotted = f"{path}." if path else ""
        for key, name, side in slot.entries():
            sides[f"{dotted}{SLOT}.{key}."] = (path, name, side)
        own = [side for _, side in slot.sides()]
        hidden |= {f"{dotted}bias" for side in own if isinstance(side, TrainedBias)}
        if path and any(isinstance(side, TrainedCopy | TrainedRows) for side in own) and not any(map(first_parts, own)):
            inserted[path] = "original_module"
        elif path and any(first_parts(side) for side in own if not isinstance(side, TrainedBias)):
            inserted[path] = "base_layer"
    found = {key: _name(key, sides, inserted, prefix) for key in keys if key not in hidden}
    return _prompts(found, sides) if prefix == "base_model." else found


def _prompts(found: dict[str, str], sides: dict[str, tuple[str, str, SidePath]]) -> dict[str, str]:
    """Virtual tokens under ``prompt_encoder``, with the module's path where several modules have some."""
    keys = {
        key: start for start, (_, _, side) in sides.items() if not isinstance(side, TrainedCopy) for key in found if key.startswith(start)
    }
    several = len({sides[start][0] for start in keys.values()}) > 1
    for key, start in keys.items():
        path, name, _ = sides[start]
        found[key] = ".".join(part for part in ("prompt_encoder", name, path if several else "", key.removeprefix(start)) if part)
    return found


def _name(key: str, sides: dict[str, tuple[str, str, SidePath]], inserted: dict[str, str], prefix: str) -> str:
    marker = f".{SLOT}." if f".{SLOT}." in key else f"{SLOT}." if key.startswith(f"{SLOT}.") else None
    if marker is not None:
        head, _, rest = key.partition(marker)
        child, _, own = rest.partition(".")
        path, name, side = sides[f"{head}{marker}{child}."]
        pattern = shown(side).get(own, f"byway.{{}}.{own}")
        if isinstance(side, TrainedBias):
            pattern = f"{inserted[path]}.bias" if path in inserted else "bias"
        if not path:
            return f"prompt_encoder.{name}.{own}"
        return prefix + f"{path}.{pattern.format(name)}"
    parts = key.split(".")
    out: list[str] = []
    for index, part in enumerate(parts):
        out.append(part)
        word = inserted.get(".".join(parts[: index + 1]))
        if word is not None and index + 1 < len(parts):
            out.append(word)
    return prefix + ".".join(out)
