"""Adapters as directories of HF peft: what is written here peft (and vLLM) loads, what peft 0.21 writes is loaded here.

A directory holds ``adapter_config.json``, ``adapter_model.safetensors`` and a short ``README.md``. A tensor is called
``base_model.model.<module path>.<name>``, without the adapter's name; a tensor of the whole model (a prompt) has no prefix.
Only fields that peft knows are in the configuration; what Byway adds (a fingerprint of the base, a hash) is in the tensors' metadata.

Loading is strict: everything is checked before the model is touched, and in a file the tensors decide. Configuration entries that match
nothing and have no tensor are noted. Not an adapter's own, but written by peft and understood here:

* ``<path>.base_layer.weight`` of a targeted embedding or head: ignored where it equals the base's, else hung as a frozen replacement,
* ``<path>.original_module.*`` beside a module trained whole (ignored), and ``<path>.modules_to_save.*``, its second copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from byway.core.copies import TrainedBias, TrainedCopy, TrainedHeadRows, TrainedRows
from byway.core.method import Attached
from byway.core.slots import SidePath, Site, base_modules
from byway.core.targets.resolve import pattern_value
from byway.core.weights import is_transposed
from byway.disk.files import atomic_directory, to_json, write_safetensors
from byway.errors import AdapterError
from byway.formats.directory import PREFIX, README, WEIGHTS, is_adapter_directory
from byway.formats.peft.config import CONFIG, KNOWN, write_saved, write_targets
from byway.formats.peft.replaced import ReplacedWeight
from byway.formats.record import make_record
from byway.methods.lowrank.sides import LowRank

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["exactly", "key_of", "save_adapter"]


_COPIES = (TrainedCopy, TrainedBias, TrainedRows, TrainedHeadRows, ReplacedWeight)

_TASK_TYPES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "ForCausalLM": ("CAUSAL_LM", ()),
    "LMHeadModel": ("CAUSAL_LM", ()),
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
}
"""How a model's class name ends → peft's task type, and the heads that peft then expects in the file if the model has them."""


def key_of(path: str, name: str) -> str:
    """What peft calls the tensor `name` of the side path at `path`."""
    return f"{PREFIX}{path}.{name}" if path else name


def save_adapter(adapter: Attached, directory: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """Write the adapter's files into `directory` itself; an adapter that is there is replaced in one step, anything else refused.

    Raises:
        AdapterError: a tensor is not finite, peft's format cannot hold this adapter, or `directory` holds something else.
        RunError: the disk refused; what was there is unchanged.
    """
    hung = adapter.side_paths()
    tensors = adapter.method.to_peft_tensors(_tensors(hung))
    config = _config(adapter, hung)
    copies = [site.path for site, side in hung if isinstance(side, TrainedCopy)]
    metadata = make_record(adapter.model, tensors, copies, tokenizer)
    with atomic_directory(directory, replace=is_adapter_directory) as new:
        (new / CONFIG).write_text(to_json(config), encoding="utf-8")
        write_safetensors(new / WEIGHTS, tensors, metadata)
        (new / README).write_text(_readme(adapter, config), encoding="utf-8")
    return directory


def _tensors(hung: Sequence[tuple[Site, SidePath]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for site, side in hung:
        exported = side.export()
        if not exported and next(side.parameters(), None) is not None:
            raise AdapterError(f"peft has no names for the tensors of {type(side).__name__} at {site.path!r}: they would be lost")
        for name, tensor in exported.items():
            key = key_of(site.path, name)
            if key in tensors:
                raise AdapterError(f"two side paths at {site.path!r} both write {key}")
            tensors[key] = tensor
    broken = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise AdapterError(f"the adapter holds NaN or infinity, in {', '.join(broken[:10])}", "load an earlier checkpoint")
    return tensors


def _config(adapter: Attached, hung: Sequence[tuple[Site, SidePath]]) -> dict[str, Any]:
    """The configuration that makes peft build exactly what hangs: derived from the sites, not from how the user chose them."""
    paths = [path for path, _ in base_modules(adapter.model) if path]
    sites = [(site, side) for site, side in hung if not isinstance(side, _COPIES)]
    saved = write_saved([site.path for site, side in hung if isinstance(side, TrainedCopy)], paths)
    config = {
        "peft_type": adapter.method.peft_type,
        "task_type": _task_type(adapter.model, saved),
        "base_model_name_or_path": _base_name(adapter.model),
        "revision": None,
        "inference_mode": True,
        **adapter.method.to_peft(),
        "modules_to_save": saved or None,
    }
    if sites and sites[0][0].path and "target_modules" in KNOWN.get(str(adapter.method.peft_type), {"target_modules"}):
        config |= write_targets([site.path for site, _ in sites], paths, saved)
    low_rank = {site.path: side for site, side in sites if isinstance(side, LowRank)}
    if low_rank:
        config["fan_in_fan_out"] = any(is_transposed(site.module) for site, _ in sites)
        config |= _pattern(config, "r", "rank_pattern", {p: side.exported_rank for p, side in low_rank.items()})
        config |= _pattern(config, "lora_alpha", "alpha_pattern", {p: side.exported_alpha for p, side in low_rank.items()})
    return config | adapter.method.peft_fields(sites, config)


def _pattern(config: Mapping[str, Any], plain: str, pattern: str, true: Mapping[str, float]) -> dict[str, Any]:
    """The fields `plain` and `pattern` that give every site its true value: the method's own where they do, else derived."""
    values = {path: int(value) if float(value).is_integer() else value for path, value in true.items()}
    own = config.get(pattern) or {}
    if all(abs(pattern_value(path, own, config[plain]) - value) <= 1e-9 * abs(value) for path, value in values.items()):
        default = config[plain]
        return {plain: int(default) if float(default).is_integer() else default, pattern: dict(own)}
    usual = Counter(values.values()).most_common(1)[0][0]
    return {plain: usual, pattern: {exactly(path): value for path, value in values.items() if value != usual}}


def exactly(path: str) -> str:
    """A pattern's key that matches only `path`: peft reads keys as regular expressions for the end of a path."""
    return "^" + path.replace(".", r"\.")


def _task_type(model: nn.Module, saved: Sequence[str]) -> str | None:
    name = type(model).__name__
    for ending, (task_type, heads) in _TASK_TYPES.items():
        if name.endswith(ending):
            there = [path for path, _ in base_modules(model) if path in heads]
            return task_type if all(head in saved for head in there) else None
    return None


def _base_name(model: nn.Module) -> str | None:
    config: Any = vars(model).get("config")
    recorded = None if config is None else vars(config).get("_name_or_path")
    return recorded if isinstance(recorded, str) and recorded else None


def _readme(adapter: Attached, config: Mapping[str, Any]) -> str:
    base = config["base_model_name_or_path"] or f"a {type(adapter.model).__name__}"
    return (
        "---\nlibrary_name: peft\ntags:\n- byway\n---\n\n"
        f"# {type(adapter.method).__name__} adapter\n\n"
        f"{adapter.num_parameters:,} trained parameters for {base}.\n\n"
        "```python\nimport byway\nbyway.load(model, 'PATH')          # or: peft.PeftModel.from_pretrained(model, 'PATH')\n```\n"
    )
