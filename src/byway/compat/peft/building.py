"""From a peft configuration to side paths: peft's rules select the targets, the core's method builds."""

from __future__ import annotations

import warnings
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from byway.compat.peft.config import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
)
from byway.core.adapter import Adapter
from byway.core.attach import activate, install
from byway.core.copies import Copy, TrainedCopy
from byway.core.families import facts
from byway.core.families.facts import inside
from byway.core.method import BuildContext, Method
from byway.core.slots import SidePath, Site, base_modules
from byway.core.targets.resolve import pattern_value
from byway.core.targets.search import ALL_LINEAR
from byway.core.token_rows import trained_rows
from byway.core.weights import is_linear
from byway.errors import AdapterError, TargetError, listed
from byway.formats.peft.config import Selection, peft_format
from byway.formats.peft.save import TASK_HEADS, exactly
from byway.methods import of_peft_config
from byway.methods.lowrank.method import LowRankMethod
from byway.methods.lowrank.sides import LowRank

__all__ = ["attach_config", "task_heads", "to_base_dtype"]

Plan = list[tuple[Site, SidePath]]

_INITS = ("gaussian", "pissa", "olora", "eva")
"""The values of ``init_lora_weights`` that the core's LoRA has under the same name."""
_UNSUPPORTED = ("megatron_config", "loftq_config", "corda_config", "lora_ga_config", "layer_replication", "ensure_weight_tying")
"""Fields of LoraConfig that no method of the core refuses by itself."""


def task_heads(config: PeftConfig) -> list[str]:
    """Return the heads that peft trains whole for the configuration's task type, whether or not the model has them."""
    return list(TASK_HEADS.get(str(config.task_type), ()))


def attach_config(model: nn.Module, config: PeftConfig, name: str, *, cast: bool) -> Adapter:
    """Attach the adapter that `config` describes as `name` and make it the only active one.

    cast: keep adapters in float32 on a half-precision base (peft's ``autocast_adapter_dtype``), not in its dtype.

    Raises:
        AdapterError: Byway does not have the method or an option, or a target does not exist; the model is unchanged.
    """
    values = config.to_dict()
    kind = of_peft_config(values)
    if kind is None:
        raise AdapterError(f"Byway has no method for peft_type {values.get('peft_type')!r}")
    refused = [field for field in _UNSUPPORTED if values.get(field)]
    if refused:
        raise AdapterError(f"Byway does not support {listed(refused)}", "leave it out, or use peft")
    try:
        copies = _copies(model, config)
        method, paths = _method(model, kind, config, values, [site.path for site, _ in copies])
        tokens = values.get("trainable_token_indices")
        plan = [*_plan(model, method, paths, copies, config), *(trained_rows(model, tokens) if tokens else ())]
    except TargetError as error:
        unspecified = values.get("target_modules") is None and "targets" in error.hint
        message = f"Please specify `target_modules` in `peft_config`: {error.message}" if unspecified else error.message
        raise AdapterError(message, error.hint) from error
    if config.kind == PeftType.LORA:
        _draw_in_pefts_order(plan, vars(config)["init_lora_weights"])
    if values.get("init_lora_weights") is False or not values.get("init_ia3_weights", True):
        _randomize(plan)
    if not cast:
        to_base_dtype(model, plan)
    activate(model, [])
    return install(model, method, name, plan)


def _copies(model: nn.Module, config: PeftConfig) -> Plan:
    """Copy the modules trained whole: every path that *ends* in a name, as in peft; of nested ones the outermost."""
    heads = task_heads(config)
    own = vars(config).get("modules_to_save")
    names = [own] if isinstance(own, str) else sorted(own or ())
    selection = Selection({"modules_to_save": list(dict.fromkeys([*names, *heads]))})
    found = {path: module for path, module in base_modules(model) if path and selection.is_saved(path)}
    missing = [name for name in names if name not in heads and not any(path.endswith(name) for path in found)]
    if missing:
        raise AdapterError(f"Target modules {missing} not found in the base model (modules_to_save). Please check them and try again.")
    outermost = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
    return [(Site(path, found[path]), TrainedCopy(found[path])) for path in outermost]


def _targets(model: nn.Module, config: PeftConfig, values: dict[str, Any], copied: list[str]) -> list[str] | None:
    """Return the paths that the configuration selects; None if the method chooses, or there is nothing to choose."""
    written = values.get("target_modules")
    if written is None or (not written and config.is_prompt_learning):
        return None
    outside = [(path, module) for path, module in base_modules(model) if path and not any(inside(path, copy) for copy in copied)]
    if isinstance(written, str) and written.lower() == ALL_LINEAR:
        heads = {facts(model).head, *(facts(model).task_heads if config.task_type == TaskType.SEQ_CLS else ())}
        excluded = Selection({"target_modules": values.get("exclude_modules") or []})
        return [path for path, module in outside if is_linear(module) and path not in heads and not excluded.is_target(path)]
    selection = Selection({key: value for key, value in values.items() if key != "modules_to_save"})
    found = [path for path, _ in outside if selection.is_target(path)]
    if not found and (written or not copied):
        raise AdapterError(
            f"Target modules {written} not found in the base model. Please check the target modules and try again.",
            "exclude_modules excludes all of them" if selection.exclude else "",
        )
    return found


def _method(
    model: nn.Module, kind: type[Method], config: PeftConfig, values: dict[str, Any], copied: list[str]
) -> tuple[Method, set[str] | None]:
    """Return the core's method for `config`, and its targets by path (None: everything the method selects)."""
    paths = _targets(model, config, values, copied)
    # attach_config builds trained rows itself, since peft names their embeddings
    peft = peft_format(kind)
    explicit = peft.normalized(values) | {"modules_to_save": copied or None, "trainable_token_indices": None}
    if isinstance(config, LoraConfig):  # _as_trained sets it: to a method, this field says that peft has changed the base
        explicit["init_lora_weights"] = True
    by_path = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    if paths is not None:
        explicit |= by_path | {"target_modules": paths}
        for field in ("rank_pattern", "alpha_pattern"):
            own = explicit.get(field) or {}
            found = {path: pattern_value(path, own, None) for path in paths}
            explicit[field] = {exactly(path): value for path, value in found.items() if value is not None}
        inner = values.get("feedforward_modules")
        if isinstance(config, IA3Config) and inner is not None:
            explicit["feedforward_modules"] = [path for path in paths if Selection({"target_modules": inner}).is_target(path)]
    elif values.get("layers_to_transform") is not None:
        by_default = peft.method(kind, explicit | {"layers_to_transform": None})
        selection = Selection({"target_modules": ".*", **{k: values.get(k) for k in ("layers_to_transform", "layers_pattern")}})
        paths = [site.path for site in by_default.plan(model).sites if selection._layer(site.path) in selection.layers]
        explicit |= by_path | {"target_modules": paths}
    method = peft.method(kind, explicit)
    return replace(method, **_as_trained(method, config, model)), None if paths is None else set(paths)


def _as_trained(method: Method, config: PeftConfig, model: nn.Module) -> dict[str, Any]:
    """Return the fields that a file does not record: the initialization, and a prompt's encoder."""
    if isinstance(config, LoraConfig):
        init = config.init_lora_weights
        if isinstance(init, bool) or "init" not in {f.name for f in fields(method)}:
            return {}
        name = str(init).lower()
        if name not in _INITS and not name.startswith("pissa_niter_"):
            raise AdapterError(f"Byway does not support init_lora_weights={init!r}", f"there are: True, False, {listed(_INITS)}")
        return {"init": name if name in _INITS else "pissa_fast"}
    if isinstance(config, PromptTuningConfig):
        if config.prompt_tuning_init == PromptTuningInit.TEXT:
            return {"init": "text", "text": config.prompt_tuning_init_text}
        return {"init": "vocabulary" if config.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB else "random"}
    if isinstance(config, PromptEncoderConfig):
        encoder = str(config.encoder_reparameterization_type).lower()
        options = {"lstm_layers": config.encoder_num_layers} if encoder == "lstm" else {}
        return {"encoder": encoder, "hidden_size": config.encoder_hidden_size, "dropout": config.encoder_dropout, **options}
    if isinstance(config, PrefixTuningConfig) and config.prefix_projection:
        if config.encoder_hidden_size:
            return {"hidden_size": config.encoder_hidden_size}
        if "config" not in vars(model):
            raise AdapterError("prefix_projection: the model has no configuration to read its width from", "set encoder_hidden_size")
        return {"hidden_size": vars(model)["config"].get_text_config().hidden_size}
    return {}


def _plan(model: nn.Module, method: Method, paths: set[str] | None, copies: Plan, config: PeftConfig) -> Plan:
    """Build every side path. Ranks are not checked: peft has no upper bound."""
    copied = [site.path for site, _ in copies]
    if paths is not None and isinstance(config, LNTuningConfig):  # peft trains whatever is named, norm or not
        sites = [Site(path, module) for path, module in base_modules(model) if path in paths]
    else:
        sites = [] if paths is not None and not paths else [s for s in method.plan(model).sites if paths is None or s.path in paths]
    sites = [site for site in sites if not any(inside(site.path, copy) for copy in copied)]
    for site in sites:
        module = site.module
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and isinstance(method, LowRankMethod):
            rank = method.rank_at(site.path)
            if rank % module.groups:
                raise AdapterError(
                    f"Targeting a {type(module).__name__} with groups={module.groups} and rank {rank}. Currently, support is limited to "
                    "conv layers where the rank is divisible by groups. "
                    "Either choose a different rank or do not target this specific layer."
                )
    tokenizer: Any = None
    if isinstance(config, PromptTuningConfig) and config.prompt_tuning_init == PromptTuningInit.TEXT and not config.inference_mode:
        from transformers import AutoTokenizer

        options = dict(config.tokenizer_kwargs or {})
        if options.pop("trust_remote_code", False):  # remote code is never run
            warnings.warn("tokenizer_kwargs: trust_remote_code is ignored", stacklevel=3)
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)
    # what LoRA draws here is replaced: leave the user's random state alone
    context = BuildContext(tokenizer, generator=torch.Generator()) if config.kind == PeftType.LORA else BuildContext(tokenizer)
    plan = [(site, method.build(site, model, context)) for site in sites]
    extras = [(site, side) for site, side in method.extras(model, context, sites) if not any(inside(site.path, copy) for copy in copied)]
    return [*plan, *copies, *extras]


@torch.no_grad()
def _draw_in_pefts_order(plan: Plan, init: bool | str) -> None:
    """Draw initial factors as peft does, so that one seed gives the same adapter in both libraries.

    peft makes two ordinary layers, which draw A and B, and then draws A again (for an embedding B), in float32 and
    rounded to the base's dtype.
    """
    for site, side in plan:
        if not isinstance(side, LowRank):
            continue
        is_embedding = isinstance(site.module, nn.Embedding)
        weight = site.module.weight
        assert isinstance(weight, Tensor)

        def ordinary(parameter: Tensor, like_embedding: bool = is_embedding) -> Tensor:
            drawn = torch.empty(parameter.shape)
            return drawn.normal_() if like_embedding else nn.init.kaiming_uniform_(drawn, a=5**0.5)

        drawn = {"lora_A": ordinary(side.lora_A), "lora_B": ordinary(side.lora_B)}
        if side.lora_bias is not None:
            bound = 1.0 / side.rank**0.5
            drawn["lora_bias"] = torch.empty(side.lora_bias.shape).uniform_(-bound, bound)
        if init in (True, "gaussian"):
            factor = "lora_B" if is_embedding else "lora_A"
            again = ordinary(drawn[factor]) if init is True or is_embedding else drawn[factor].normal_(std=1 / side.rank)
            drawn = {factor: again}
        if isinstance(init, bool) or init == "gaussian":
            for name, value in drawn.items():
                side.get_parameter(name).copy_(value.to(weight.dtype) if weight.is_floating_point() else value)


@torch.no_grad()
def _randomize(plan: Plan) -> None:
    """Draw the tensors of the other methods (``init_lora_weights=False``), for tests, as in peft."""
    for _, side in plan:
        for name, tensor in () if isinstance(side, Copy | LowRank) else side.named_parameters():
            if name not in ("rows", "bias"):
                tensor.normal_(0.0, 0.02) if tensor.dim() >= 2 else tensor.add_(torch.randn_like(tensor))


def to_base_dtype(model: nn.Module, plan: Plan) -> None:
    """Keep side paths in the dtype of their modules, as peft does without ``autocast_adapter_dtype``."""
    for site, side in plan:
        floating = (p for module in (site.module, model) for p in module.parameters() if p.is_floating_point())
        tensor = next(floating, None)
        if tensor is not None:
            side.to(tensor.dtype)
            if isinstance(side, Copy):
                side.dtype = tensor.dtype
