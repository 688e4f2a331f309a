"""Choose the class to load a configuration as, and check transformers' loading report.

Task ``auto`` takes the class that the checkpoint was saved from. If the configuration names none: sequence to sequence
for an encoder-decoder, a causal language model for a decoder, the bare trunk for an encoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from byway.base.heads import HEADS
from byway.errors import ConfigError, listed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["HEAD_NAMES", "judge", "model_class"]

HEAD_NAMES = (
    "classifier",
    "score",
    "qa_outputs",
    "classification_head",
    "pre_classifier",
    "sequence_summary",
    "logits_proj",
    "pooler",
    "lm_head",
    "embed_out",
)
"""Names of modules that turn a trunk's states into outputs; never quantized, as they are trained and may be new."""


def model_class(config: PreTrainedConfig, task: str, name: str) -> type[PreTrainedModel]:
    """Return the class to call ``from_pretrained`` on; ConfigError if the architecture has no such head."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    kind = type(config)
    what = f"the base {name!r} ({config.model_type})"
    causal = kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING and kind not in auto.MODEL_FOR_MASKED_LM_MAPPING
    if head := HEADS.get(task):
        if head.decoder and (config.is_encoder_decoder or not (causal or config.to_dict().get("is_decoder"))):
            found = "an encoder-decoder" if config.is_encoder_decoder else "not a decoder"
            raise ConfigError(f"{what} is {found}, so it cannot be {head.words}", "use another base, or another task")
        mapping = vars(auto)[head.mapping]
        if kind not in mapping:
            raise ConfigError(f"{what} cannot be {head.words}: transformers has no such class for it", "use another base")
        return _first(mapping[kind])
    saved = _saved_class(config)
    bare = _first(auto.MODEL_MAPPING[kind]) if kind in auto.MODEL_MAPPING else None
    if saved is not None and not (causal and saved is bare):
        return saved
    if config.is_encoder_decoder and kind in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return _first(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[kind])
    if causal:
        return _first(auto.MODEL_FOR_CAUSAL_LM_MAPPING[kind])
    if bare is None:
        raise ConfigError(f"transformers {transformers.__version__} has no model class for {what}")
    return bare


def _first(entry: Any) -> type[PreTrainedModel]:
    """Return the class of a mapping's entry; the first, usual one if there are several."""
    return entry[0] if isinstance(entry, tuple) else entry


def _saved_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class that config.json's ``architectures`` names, if transformers has it for this configuration."""
    from transformers.models.auto import modeling_auto as auto

    wanted = (config.architectures or [""])[0]
    for label, mapping in vars(auto).items():
        if not label.startswith("MODEL_") or not label.endswith("_MAPPING") or type(config) not in mapping:
            continue
        entry = mapping[type(config)]
        for cls in entry if isinstance(entry, tuple) else (entry,):
            if cls.__name__ == wanted:
                return cls
    return None


def judge(model: PreTrainedModel, info: Mapping[str, Any], *, name: str, new_head: bool) -> tuple[list[str], list[str]]:
    """Check transformers' loading report `info`; return (newly drawn tensors, unused tensors of another head).

    Raises ConfigError if tensors are missing, have other shapes, or belong to the trunk without having a place in it.
    `new_head`: tensors outside the trunk, and its pooler, may be missing or of another size (a fresh head). Tensors of
    other heads in the file are no error: bert-base-uncased has some.
    """
    inner = dict(model.named_children()).get(model.base_model_prefix, model)
    heads = () if inner is not model else HEAD_NAMES
    trunk = frozenset(name for name, _ in inner.named_children() if name not in heads)  # layers, encoder, …
    missing = sorted(info["missing_keys"])
    mismatched = {key: (tuple(stored), tuple(wanted)) for key, stored, wanted in info["mismatched_keys"]}
    fresh = [key for key in (*missing, *mismatched) if new_head and not _in_trunk(key, model.base_model_prefix, trunk)]
    problems: list[str] = []
    if lost := [key for key in missing if key not in fresh]:
        problems.append(f"{len(lost)} tensors are missing: {listed(lost, 10)}")
    if wrong := {key: shapes for key, shapes in mismatched.items() if key not in fresh}:
        shown = [f"{key} is {stored}, config.json says {wanted}" for key, (stored, wanted) in wrong.items()]
        problems.append(f"{len(wrong)} tensors have another shape: {listed(shown, 5)}")
    unexpected = sorted(info["unexpected_keys"])
    if stray := [key for key in unexpected if _in_trunk(key, model.base_model_prefix, trunk)]:
        problems.append(f"{len(stray)} tensors have no place in a {type(model).__name__}: {listed(stray, 10)}")
    problems += [str(line) for line in info.get("error_msgs", ())]
    if problems:
        raise ConfigError(
            f"the weights of the base {name!r} do not fit its config.json: {'; '.join(problems)}",
            "use weights and configuration of one model; a directory saved while adapters were attached has their tensors too",
        )
    return fresh, [key for key in unexpected if key not in stray]


def _in_trunk(key: str, prefix: str, children: Iterable[str]) -> bool:
    """True if a tensor's name, with or without prefix, is in the trunk; a pooler counts as part of the head."""
    parts = key.removeprefix(f"{prefix}.").split(".")
    return "pooler" not in parts and (parts[0] in children or (len(parts) == 1 and key.startswith(f"{prefix}.")))
