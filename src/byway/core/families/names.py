"""Module paths and checkpoint names; they differ where transformers 5 renamed modules (ViT, Swin, CLIP ...).

The API uses module paths, files use checkpoint names. The renamings are transformers' own conversion mapping, in the
form it uses for a model made from its configuration, so that names do not depend on how a model was loaded.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from byway.core.families.detect import outermost, pretrained_models
from byway.core.slots import base_modules

__all__ = ["checkpoint_names"]


def checkpoint_names(model: nn.Module) -> dict[str, str | None]:
    """Return the name in checkpoint files of every module with tensors of its own, by module path:
    ``vit.encoder.layer.0.attention.attention.query`` for ``vit.layers.0.attention.q_proj``.

    None if there is no single name: merged experts, and maps that are split, fused or permuted in the checkpoint.
    """
    names: dict[str, str | None] = {}
    # the model itself, for the modules outside the transformers models in it
    for root, part in {"": model, **dict(outermost(pretrained_models(dict(base_modules(model)))))}.items():
        names |= _of(root, part)
    return names


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
