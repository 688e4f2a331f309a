"""From one of peft's configurations to what hangs on the model: targets by peft's rules, everything else by the core's method."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from byway.compat.peft.config import IA3Config, LNTuningConfig, LoraConfig, PeftConfig, PromptTuningConfig
from byway.compat.peft.prompts import as_trained
from byway.compat.peft.types import PromptTuningInit, TaskType, text
from byway.core.adapter import Adapter
from byway.core.attach import activate, hang
from byway.core.copies import Copy, TrainedCopy, TrainedRows, rows_of_tied, tied_to
from byway.core.families import facts
from byway.core.method import BuildContext, Method
from byway.core.slots import SidePath, Site, base_modules
from byway.core.targets.resolve import pattern_value
from byway.core.targets.search import ALL_LINEAR
from byway.core.weights import is_linear
from byway.errors import AdapterError, BywayError, TargetError, listed
from byway.formats.peft.config import Selection
from byway.formats.peft.save import exactly
from byway.methods import of_peft_config
from byway.methods.lowrank.method import LowRankMethod
from byway.methods.lowrank.sides import LowRank

__all__ = ["hang_config", "saved_by_task", "to_base_dtype"]

Plan = list[tuple[Site, SidePath]]

_HEADS: Mapping[TaskType, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
_STARTS = {"gaussian": "gaussian", "pissa": "pissa", "olora": "olora", "eva": "eva"}
"""``init_lora_weights`` → the start of the core's LoRA."""
_ELSEWHERE = ("megatron_config", "loftq_config", "corda_config", "lora_ga_config", "layer_replication", "ensure_weight_tying")
"""Fields of LoraConfig that are neither among a method's variants nor honored here."""


def saved_by_task(config: PeftConfig) -> list[str]:
    """The heads that peft trains whole for the configuration's task type, whether or not the model has them."""
    return list(_HEADS.get(TaskType(str(config.task_type)), ())) if config.task_type is not None else []


def hang_config(model: nn.Module, config: PeftConfig, name: str, *, cast: bool, tokenizer: Any = None) -> Adapter:
    """Attach what `config` describes as adapter `name`; no adapter is active afterwards but this one.

    cast: adapters in float32 beside a half-precision base (peft's ``autocast_adapter_dtype``), else in the base's dtype.

    Raises:
        AdapterError: Byway has no such method or option, or a target is not there; the model is unchanged.
    """
    values = text(config.to_dict())
    kind = of_peft_config(values)
    if kind is None:
        raise AdapterError(f"Byway has no method for peft_type {values.get('peft_type')!r}")
    refused = [field for field in _ELSEWHERE if values.get(field)]
    if refused:
        raise AdapterError(f"{listed(refused)}: Byway does not have this", "leave it out, or use peft")
    try:
        copies = _copies(model, config)
        method, wanted = _method(model, kind, config, values, copies)
        context = BuildContext(tokenizer or _tokenizer(config))
        anything = isinstance(config, LNTuningConfig)  # peft trains whatever is named, norm or not
        plan = [*_plan(model, method, wanted, copies, context, anything=anything), *_token_rows(model, values)]
    except TargetError as error:
        raise AdapterError(_in_peft_words(config, error), error.hint) from error
    _start(plan, config)
    if not cast:
        to_base_dtype(model, plan)
    activate(model, [])
    return hang(model, method, name, plan)


def _in_peft_words(config: PeftConfig, error: BywayError) -> str:
    if values_of(config, "target_modules") is None and "targets" in error.hint:
        return f"Please specify `target_modules` in `peft_config`: {error.message}"
    return error.message


def values_of(config: PeftConfig, field: str) -> Any:
    """A field of the configuration, None where its class does not have it."""
    return vars(config).get(field)


def _copies(model: nn.Module, config: PeftConfig) -> Plan:
    """The modules that are trained whole: every path that *ends* in a name, as in peft; the outermost where they lie in each other."""
    heads = saved_by_task(config)
    own = values_of(config, "modules_to_save")
    names = [own] if isinstance(own, str) else sorted(own or ())
    selection = Selection({"modules_to_save": list(dict.fromkeys([*names, *heads]))})
    found = [(path, module) for path, module in base_modules(model) if path and selection.is_saved(path)]
    missing = [n for n in names if n not in heads and not any(path.endswith(n) for path, _ in found)]
    if missing:
        raise AdapterError(f"Target modules {missing} not found in the base model (modules_to_save). Please check them and try again.")
    outer = [p for p, _ in found]
    kept = [(path, module) for path, module in found if not any(path.startswith(f"{other}.") for other in outer)]
    return [(Site(path, module), TrainedCopy(module)) for path, module in kept]


def _targets(model: nn.Module, config: PeftConfig, values: dict[str, Any], copied: list[str]) -> list[str] | None:
    """Paths that the configuration selects; None where the method's own choice is asked for, or none is needed."""
    written = values.get("target_modules")
    if written is None or (not written and config.is_prompt_learning):
        return None
    outside = [(p, m) for p, m in base_modules(model) if p and not any(p == c or p.startswith(f"{c}.") for c in copied)]
    if isinstance(written, str) and written.lower() == ALL_LINEAR:
        heads = {facts(model).head, *(facts(model).task_heads if config.task_type == TaskType.SEQ_CLS else ())}
        excluded = Selection({"target_modules": values.get("exclude_modules") or []})
        return [p for p, m in outside if is_linear(m) and p not in heads and not excluded.is_target(p)]
    selection = Selection({k: v for k, v in values.items() if k != "modules_to_save"})
    found = [path for path, _ in outside if selection.is_target(path)]
    if not found and (written or not copied):
        raise AdapterError(
            f"Target modules {written} not found in the base model. Please check the target modules and try again.",
            "" if selection.exclude in ([], "") else "exclude_modules leaves nothing over",
        )
    return found


def _method(
    model: nn.Module, kind: type[Method], config: PeftConfig, values: dict[str, Any], copies: Plan
) -> tuple[Method, set[str] | None]:
    """The core's method for `config`, with targets by path, and these paths (None: all the method finds)."""
    saved = [site.path for site, _ in copies]
    paths = _targets(model, config, values, saved)
    # rows of embeddings are hung here: peft names the embeddings they belong to
    explicit = kind.normalized_peft(values) | {"modules_to_save": saved or None, "trainable_token_indices": None}
    if isinstance(config, LoraConfig):  # how factors start is settled below: as a file's field it would say that the base was changed
        explicit["init_lora_weights"] = True
    if paths is not None:
        explicit |= {"target_modules": paths, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
        for field in ("rank_pattern", "alpha_pattern"):
            own = explicit.get(field) or {}
            found = {path: pattern_value(path, own, None) for path in paths}
            explicit[field] = {exactly(path): value for path, value in found.items() if value is not None}
        inner = values.get("feedforward_modules")
        if isinstance(config, IA3Config) and inner is not None:
            explicit["feedforward_modules"] = [p for p in paths if Selection({"target_modules": inner}).is_target(p)]
    elif values.get("layers_to_transform") is not None:
        by_default = kind.from_peft(explicit | {"layers_to_transform": None})
        selection = Selection({"target_modules": ".*", **{k: values.get(k) for k in ("layers_to_transform", "layers_pattern")}})
        paths = [site.path for site in by_default.sites(model) if selection._layer(site.path) in selection.layers]
        explicit |= {"target_modules": paths, "layers_to_transform": None, "layers_pattern": None}
    method = kind.from_peft(explicit)
    if isinstance(config, LoraConfig):
        method = _with_start(method, config)
    elif config.is_prompt_learning:
        method = as_trained(method, config, model)
    return method, None if paths is None else set(paths)


def _with_start(method: Method, config: LoraConfig) -> Method:
    start = config.init_lora_weights
    if start is True or start is False or "init" not in {f.name for f in fields(method)}:
        return method
    exact = str(start).lower()
    own = "pissa_fast" if exact.startswith("pissa_niter_") else _STARTS.get(exact)
    if own is None:
        raise AdapterError(f"init_lora_weights={start!r}: Byway does not have this start", f"there are: True, False, {listed(_STARTS)}")
    return replace(method, **{"init": own})


def _plan(
    model: nn.Module, method: Method, wanted: set[str] | None, copies: Plan, context: BuildContext, *, anything: bool = False
) -> Plan:
    """Every side path, built and not yet hung. peft has no upper bound for the rank, so the method is not asked to check it."""
    copied = [site.path for site, _ in copies]
    if wanted is None:
        sites = list(method.sites(model))
    elif anything:
        sites = [Site(path, module) for path, module in base_modules(model) if path in wanted]
    else:
        sites = [site for site in method.sites(model) if site.path in wanted] if wanted else []
    sites = [site for site in sites if not any(site.path == path or site.path.startswith(f"{path}.") for path in copied)]
    for site in sites:
        _check_groups(site.module, method, site.path)
    plan = [(site, method.build(site, model, context)) for site in sites]
    extras = [
        (site, side)
        for site, side in method.extras(model, context, sites)
        if not any(site.path == path or site.path.startswith(f"{path}.") for path in copied)
    ]
    return [*plan, *copies, *extras]


def _token_rows(model: nn.Module, values: dict[str, Any]) -> Iterator[tuple[Site, SidePath]]:
    """Trained rows: of the embeddings that are named, or of the input embedding; a head that is tied to one reads the same rows."""
    written = values.get("trainable_token_indices")
    if not written:
        return
    modules = dict(base_modules(model))
    by_name = written if isinstance(written, dict) else {_input_embedding(model): written}
    seen: set[str] = set()
    for name, indices in by_name.items():
        found = [path for path in modules if path == name or path.endswith(f".{name}")]
        if not found:
            raise AdapterError(f"Target modules {name!r} not found in the base model (trainable_token_indices).")
        for path in (p for p in found if p not in seen):
            tied = [other for other in tied_to(model, path) if other not in found]
            embedding = modules[path]
            if not isinstance(embedding, nn.Embedding):
                if any(
                    other in seen or (isinstance(modules[other], nn.Embedding) and any(_ends(other, n) for n in by_name)) for other in tied
                ):
                    continue  # its rows come with the embedding that it is tied to
                raise AdapterError(
                    f"trainable_token_indices: {path} is a {type(embedding).__name__}, only an embedding's rows can be trained"
                )
            rows = TrainedRows(embedding, tuple(indices))
            seen.update((path, *tied))
            yield Site(path, embedding), rows
            for other, module, side in rows_of_tied(model, rows, tied):
                yield Site(other, module), side


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _input_embedding(model: nn.Module) -> str:
    """The path of the embedding with the most rows; positions and token types are far smaller."""
    found = [(m.num_embeddings, path) for path, m in base_modules(model) if isinstance(m, nn.Embedding)]
    if not found:
        raise AdapterError(f"trainable_token_indices: {type(model).__name__} has no embedding")
    return max(found, key=lambda pair: pair[0])[1]


def _check_groups(module: nn.Module, method: Method, path: str) -> None:
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or not isinstance(method, LowRankMethod):
        return
    rank = method.rank_at(path)
    if rank % module.groups:
        raise AdapterError(
            f"Targeting a {type(module).__name__} with groups={module.groups} and rank {rank}. Currently, support is limited to conv "
            "layers where the rank is divisible by groups. Either choose a different rank or do not target this specific layer."
        )


def _tokenizer(config: PeftConfig) -> Any:
    """The tokenizer that a prompt's text start needs, as the configuration names it; code from elsewhere is never run for it."""
    if not isinstance(config, PromptTuningConfig) or config.prompt_tuning_init != PromptTuningInit.TEXT or config.inference_mode:
        return None
    from transformers import AutoTokenizer

    options = dict(config.tokenizer_kwargs or {})
    if options.pop("trust_remote_code", False):
        warnings.warn("tokenizer_kwargs: trust_remote_code is ignored", stacklevel=4)
    return AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)


def _start(plan: Plan, config: PeftConfig) -> None:
    """``init_lora_weights=False``: random B too, so that the update is not zero; for tests and experiments only, as in peft."""
    wants_random = (isinstance(config, LoraConfig) and config.init_lora_weights is False) or (
        isinstance(config, IA3Config) and not config.init_ia3_weights
    )
    if not wants_random:
        return
    for _, side in plan:
        if isinstance(side, Copy):
            continue
        for name, tensor in side.named_parameters():
            with torch.no_grad():
                _randomize(side, name, tensor)


def _randomize(side: SidePath, name: str, tensor: torch.Tensor) -> None:
    if isinstance(side, LowRank) and name in ("lora_A", "lora_B") and tensor.dim() >= 2 and "lora_A" in side.peft_names:
        if side.peft_names["lora_A"].startswith("lora_embedding"):
            tensor.normal_()
        elif not side.peft_names["lora_A"].endswith("weight") or name == "lora_B":
            nn.init.kaiming_uniform_(tensor, a=5**0.5)
    elif name == "lora_bias":
        bound = 1.0 / max(1, tensor.numel()) ** 0.5
        tensor.uniform_(-bound, bound)
    elif not isinstance(side, LowRank) and name not in ("rows", "bias"):
        tensor.normal_(0.0, 0.02) if tensor.dim() >= 2 else tensor.add_(torch.randn_like(tensor))


def to_base_dtype(model: nn.Module, plan: Plan) -> None:
    """Keep side paths in the dtype of the modules they stand beside, as peft does without ``autocast_adapter_dtype``."""
    for site, side in plan:
        tensor = next((p for p in site.module.parameters() if p.is_floating_point()), None)
        tensor = tensor if tensor is not None else next((p for p in model.parameters() if p.is_floating_point()), None)
        if tensor is not None:
            side.to(tensor.dtype)
            if isinstance(side, Copy):
                side.dtype = tensor.dtype
