"""Which class a configuration is loaded as, and what transformers' loading report may say.

``auto`` takes the class the checkpoint was saved from; where the configuration names none, its kind decides: encoder-decoder ->
sequence to sequence, decoder -> causal language model, encoder -> its bare trunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from byway.errors import ConfigError, listed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["HEAD_NAMES", "Landing", "judge", "model_class"]

# modules that turn a trunk's states into labels: never quantized (they are trained, and may be new)
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


def model_class(config: PreTrainedConfig, task: str, name: str) -> type[PreTrainedModel]:
    """The class to call ``from_pretrained`` on. ConfigError if `task` and architecture do not go together."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    kind = type(config)
    what = f"the base {name!r} ({config.model_type})"
    causal = kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING and kind not in auto.MODEL_FOR_MASKED_LM_MAPPING
    if task == "classification":
        if kind not in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise ConfigError(f"{what} has no sequence classifier in transformers", "choose another base")
        return _first(auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[kind])
    if task == "causal_lm":
        if config.is_encoder_decoder or not (causal or config.to_dict().get("is_decoder")):
            found = "an encoder-decoder" if config.is_encoder_decoder else "no decoder"
            raise ConfigError(f"{what} is {found}, so it is no causal language model", "choose another base, or task 'auto'")
        return _first(auto.MODEL_FOR_CAUSAL_LM_MAPPING[kind])
    saved = _saved_class(config)
    bare = _first(auto.MODEL_MAPPING[kind]) if kind in auto.MODEL_MAPPING else None
    if saved is not None and not (causal and saved is bare):
        return saved
    if config.is_encoder_decoder and kind in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return _first(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[kind])
    if causal:
        return _first(auto.MODEL_FOR_CAUSAL_LM_MAPPING[kind])
    if bare is None:
        raise ConfigError(f"{what} is of no architecture that transformers {transformers.__version__} can load")
    return bare


def _first(entry: Any) -> type[PreTrainedModel]:
    """A few configurations map to several classes; the first is the usual one."""
    return entry[0] if isinstance(entry, tuple) else entry


def _saved_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that config.json's ``architectures`` names, if transformers knows it for this kind of configuration."""
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


@dataclass(frozen=True, kw_only=True)
class Landing:
    """How a checkpoint has landed, where that needs saying. ``fresh``: tensors newly drawn; ``unused``: another task's head in the file."""

    fresh: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def judge(model: PreTrainedModel, info: Mapping[str, Any], *, name: str, new_head: bool) -> Landing:
    """Refuse a checkpoint of which something is missing, has other shapes, or belongs to the trunk and found no place.

    `info`: transformers' loading report. ``new_head``: tensors outside the trunk, and its pooler, may be missing or of another size
    (a fresh task head). Tensors of other heads in the file are reported, not refused: bert-base-uncased has some.
    """
    trunk = _trunk_children(model)
    missing = sorted(info["missing_keys"])
    mismatched = {key: (tuple(stored), tuple(wanted)) for key, stored, wanted in info["mismatched_keys"]}
    fresh = [key for key in (*missing, *mismatched) if new_head and not _in_trunk(key, model.base_model_prefix, trunk)]
    problems: list[str] = []
    if lost := [key for key in missing if key not in fresh]:
        problems.append(f"{len(lost)} tensors are missing: {listed(lost, 10)}")
    if wrong := {key: shapes for key, shapes in mismatched.items() if key not in fresh}:
        shown = [f"{key} is {stored}, config.json makes it {wanted}" for key, (stored, wanted) in wrong.items()]
        problems.append(f"{len(wrong)} tensors have another shape: {listed(shown, 5)}")
    unexpected = sorted(info["unexpected_keys"])
    if stray := [key for key in unexpected if _in_trunk(key, model.base_model_prefix, trunk)]:
        problems.append(f"{len(stray)} tensors have no place in a {type(model).__name__}: {listed(stray, 10)}")
    problems += [str(line) for line in info.get("error_msgs", ())]
    if problems:
        raise ConfigError(
            f"the weights of the base {name!r} do not fit its config.json: {'; '.join(problems)}",
            "weights and configuration must be of one model; a directory written while adapters were attached holds their tensors too",
        )
    return Landing(fresh=fresh, unused=[key for key in unexpected if key not in stray])


def _trunk_children(model: PreTrainedModel) -> frozenset[str]:
    """The names of the trunk's direct children: ``layers``, ``encoder``, …"""
    children = dict(model.named_children())
    trunk = children.get(model.base_model_prefix, model)
    heads = () if trunk is not model else HEAD_NAMES
    return frozenset(name for name, _ in trunk.named_children() if name not in heads)


def _in_trunk(key: str, prefix: str, children: Iterable[str]) -> bool:
    """Whether a tensor's name lies in the trunk, with or without its prefix; a pooler counts as part of the head."""
    parts = key.removeprefix(f"{prefix}.").split(".")
    return "pooler" not in parts and (parts[0] in children or (len(parts) == 1 and key.startswith(f"{prefix}.")))
