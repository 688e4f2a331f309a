"""Module paths and the names of modules in checkpoint files, which differ where transformers 5 renamed modules (ViT,
Swin, CLIP ...).

The API uses module paths, files use checkpoint names. The renamings are transformers' own conversion mapping, in the
form it uses for a model made from its configuration, so that names do not depend on how a model was loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from byway.core.families.detect import outermost, pretrained_models
from byway.core.slots import base_modules
from byway.errors import TargetError, nearest

__all__ = ["checkpoint_name", "checkpoint_names", "module_path", "renamed_on_loading", "taken_for_experts"]

_EXPERTS: Mapping[tuple[str, ...], frozenset[str]] = {
    ("gate", "w1", "w2", "w3"): frozenset({"mixtral", "minimax", "minimax_m2"}),
    ("gate", "gate_proj", "up_proj", "down_proj"): frozenset(
        {
            "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe",
            "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum", "olmoe",
            "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text", "qwen3_omni_moe_thinker", "solar_open",
        }
    ),
}  # fmt: skip
"""Names of linear maps → the model types for which HF peft takes them for experts."""


def checkpoint_names(model: nn.Module) -> dict[str, str | None]:
    """Return the name in checkpoint files of every module with tensors of its own, by module path.

    None if there is no single name: merged experts, and maps whose counterpart in the checkpoint is split, fused or
    permuted.
    """
    names: dict[str, str | None] = {}
    # the model itself, for the modules outside the transformers models in it
    for root, part in {"": model, **dict(outermost(pretrained_models(dict(base_modules(model)))))}.items():
        names |= _of(root, part)
    return names


def checkpoint_name(model: nn.Module, path: str) -> str | None:
    """Return the checkpoint name of one module: ``vit.layers.0.attention.q_proj`` ->
    ``vit.encoder.layer.0.attention.attention.query``.

    None if there is no single name. For many paths call :func:`checkpoint_names` once.

    Raises:
        TargetError: the model has no module with tensors of its own at `path`.
    """
    names = checkpoint_names(model)
    if path not in names:
        raise TargetError(f"the model has no module with tensors of its own at {path!r}", nearest(path, names))
    return names[path]


def module_path(model: nn.Module, name: str) -> str:
    """Return the path of the module with this checkpoint name or module path. Raises TargetError if there is none."""
    names = checkpoint_names(model)
    inverse = {there: path for path, there in names.items() if there is not None}
    if name in inverse:
        return inverse[name]
    if name in names:
        return name
    raise TargetError(f"{name!r} is neither a checkpoint name nor a module path of this model", nearest(name, [*inverse, *names]))


def taken_for_experts(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Return those of `paths` that HF peft (0.19 and later) takes for experts when it reads a LoRA for this model.

    Where transformers 5 keeps experts as 3-D parameters, peft turns targets with the names that experts had before into
    such parameters. Dense layers, shared experts and gates beside the experts have the same names.
    """
    config: Any = vars(model).get("config")
    names = next((names for names, types in _EXPERTS.items() if config is not None and config.to_dict().get("model_type") in types), ())
    return [path for path in paths if path.rpartition(".")[2] in names]


def renamed_on_loading(model: Any, paths: Iterable[str]) -> list[str]:
    """Return those of `paths` that transformers renames when it loads a checkpoint: it takes them for older names."""
    utils = sys.modules.get("transformers.modeling_utils")
    if utils is None or not isinstance(model, utils.PreTrainedModel):
        return []
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightRenaming

    found = []
    steps = [s for s in get_model_conversion_mapping(model) if isinstance(s, WeightRenaming) and not isinstance(s, PrefixChange)]
    for path in paths:
        name = f"{path}.weight"
        for step in steps:
            name, _ = step.rename_source_key(name)
        if not f"{path}.weight".endswith(name):
            found.append(path)
    return found


def _of(root: str, model: nn.Module) -> dict[str, str | None]:
    prefix = f"{root}." if root else ""
    keys: dict[str, list[str]] = {}
    for path, module in base_modules(model):
        own = [*module._parameters, *module._buffers]
        if own:
            # by its weight; a module without one (a class token, experts) by all its tensors
            keys[path] = [f"{path}.{name}" if path else name for name in (["weight"] if "weight" in own else own)]
    renamed = _renamed(model, [key for group in keys.values() for key in group])
    return {prefix + path: _common([(key, renamed[key]) for key in group], prefix) for path, group in keys.items()}


def _common(pairs: list[tuple[str, str | None]], prefix: str) -> str | None:
    """Return the module name that all renamed keys share, or None."""
    names = set()
    for key, name in pairs:
        leaf = key.rpartition(".")[2]
        names.add(name.removesuffix(leaf).removesuffix(".") if name is not None and name.endswith(leaf) else None)
    only = names.pop() if len(names) == 1 else None
    return None if only is None else prefix + only


def _renamed(model: Any, keys: list[str]) -> dict[str, str | None]:
    """Return the name in a file of each state-dict key; None if its values are converted, not just renamed."""
    utils = sys.modules.get("transformers.modeling_utils")
    if utils is None or not isinstance(model, utils.PreTrainedModel):
        return {key: key for key in keys}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, dot_natural_key

    mapping = [step for step in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(step, PrefixChange)]
    steps = [step.reverse_transform() for step in reversed(mapping)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    names: dict[str, str | None] = {}
    for key in sorted(keys, key=dot_natural_key):  # in this order: some renamings look at what came before
        converted = any(step.rename_source_key(key)[1] is not None for step in converters)
        name = key
        for step in renamings:
            name, _ = step.rename_source_key(name)
        names[key] = None if converted else name
    return names
