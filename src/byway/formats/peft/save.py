"""Write an adapter as HF peft would."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from byway.base.heads import HEADS
from byway.base.source import BUILT_IN
from byway.core.copies import TrainedBias, TrainedCopy
from byway.core.disk.files import to_json
from byway.core.method import Attached
from byway.core.slots import SidePath, Site, base_modules
from byway.core.targets.resolve import pattern_value
from byway.core.token_rows import TiedRows, TrainedRows
from byway.core.weights import is_transposed
from byway.errors import AdapterError
from byway.formats.directory import README, write
from byway.formats.peft.config import CONFIG, KNOWN, PREFIX, WEIGHTS, peft_format, write_saved, write_targets
from byway.formats.peft.vocabulary import ReplacedWeight
from byway.formats.record import base_name, make_record
from byway.methods.lowrank.sides import LowRank

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TASK_HEADS", "exactly", "key_of", "save_adapter"]

_EXPORT = f"""
{BUILT_IN} is Byway's built-in base, which is on no hub (its weights are not exactly those of the model that it was made from). For other
programs, write it to a directory once, and load it from there:

```python
model, tokenizer = byway.load_base({BUILT_IN!r})
model.save_pretrained('BASE')
tokenizer.save_pretrained('BASE')
```

```python
model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained('BASE'), 'PATH')
```
"""

_COPIES = (TrainedCopy, TrainedBias, TrainedRows, TiedRows, ReplacedWeight)

_TASK_TYPES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    **{ending: (head.peft_type, head.modules) for head in HEADS.values() for ending in head.endings},
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
}
"""Ending of a model's class name → (peft's task type, heads that peft then expects in the file)."""
TASK_HEADS = dict(_TASK_TYPES.values())
"""peft's task type → the heads that peft trains whole, as far as the model has them."""


def key_of(path: str, name: str) -> str:
    """Return peft's key for the tensor `name` of the side path at `path`."""
    return f"{PREFIX}{path}.{name}" if path else name


def save_adapter(adapter: Attached, directory: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write the adapter's files; ``Format.save`` explains the arguments.

    Raises:
        AdapterError: also if peft's format cannot hold this adapter.
    """
    installed = adapter.side_paths()
    tensors: dict[str, Tensor] = {}
    for site, side in installed:
        exported = side.export()
        if not exported and next(side.parameters(), None) is not None:
            raise AdapterError(f"peft has no names for the tensors of {type(side).__name__} at {site.path!r}: they would be lost")
        for name, tensor in exported.items():
            key = key_of(site.path, name)
            if key in tensors:
                raise AdapterError(f"two side paths at {site.path!r} both write {key}")
            tensors[key] = tensor
    tensors = peft_format(adapter.method).to_file(tensors)
    config = _config(adapter, installed)
    base = config["base_model_name_or_path"] or f"a {type(adapter.model).__name__}"
    readme = (
        "---\nlibrary_name: peft\ntags:\n- byway\n---\n\n"
        f"# {type(adapter.method).__name__} adapter\n\n"
        f"{adapter.num_parameters:,} trained parameters for {base}.\n\n"
        "```python\nimport byway\nbyway.load(model, 'PATH')          # or: peft.PeftModel.from_pretrained(model, 'PATH')\n```\n"
    ) + (_EXPORT if base == BUILT_IN else "")
    write(directory, {CONFIG: to_json(config), README: readme}, {WEIGHTS: (tensors, make_record(adapter, tensors, tokenizer))})


def _config(adapter: Attached, installed: Sequence[tuple[Site, SidePath]]) -> dict[str, Any]:
    """Return the configuration that makes peft build exactly what is installed, derived from the sites."""
    paths = [path for path, _ in base_modules(adapter.model) if path]
    sites = [(site, side) for site, side in installed if not isinstance(side, _COPIES)]
    saved = write_saved([site.path for site, side in installed if isinstance(side, TrainedCopy)], paths)
    class_name = type(adapter.model).__name__
    task_type, heads = next((row for ending, row in _TASK_TYPES.items() if class_name.endswith(ending)), (None, ()))
    peft = peft_format(adapter.method)
    config = {
        "peft_type": peft.peft_type,
        "task_type": task_type if set(heads) & set(paths) <= set(saved) else None,
        "base_model_name_or_path": base_name(adapter.model),
        "revision": None,
        "inference_mode": True,
        **peft.fields(adapter.method),
        "modules_to_save": saved or None,
    }
    if sites and sites[0][0].path and "target_modules" in KNOWN.get(peft.peft_type, {"target_modules"}):
        config |= write_targets([site.path for site, _ in sites], paths, saved)
    low_rank = {site.path: side for site, side in sites if isinstance(side, LowRank)}
    if low_rank:
        config["fan_in_fan_out"] = any(is_transposed(site.module) for site, _ in sites)
        config |= _pattern(config, "r", "rank_pattern", {p: side.exported_rank for p, side in low_rank.items()})
        config |= _pattern(config, "lora_alpha", "alpha_pattern", {p: side.exported_alpha for p, side in low_rank.items()})
    return config | peft.site_fields(adapter.method, sites, config)


def _pattern(config: Mapping[str, Any], plain: str, pattern: str, true: Mapping[str, float]) -> dict[str, Any]:
    """Return `plain` and `pattern` fields that give every site its value: the method's own if they do, else derived."""
    values = {path: int(value) if float(value).is_integer() else value for path, value in true.items()}
    own = config.get(pattern) or {}
    if all(abs(pattern_value(path, own, config[plain]) - value) <= 1e-9 * abs(value) for path, value in values.items()):
        default = config[plain]
        return {plain: int(default) if float(default).is_integer() else default, pattern: dict(own)}
    usual = Counter(values.values()).most_common(1)[0][0]
    return {plain: usual, pattern: {exactly(path): value for path, value in values.items() if value != usual}}


def exactly(path: str) -> str:
    """Return a pattern key that matches only `path`: peft reads keys as regular expressions for the end of a path."""
    return "^" + path.replace(".", r"\.")
