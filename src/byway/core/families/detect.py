"""Find the facts of a model: from its family's table row, the rows of models inside it, or its structure."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from byway.core.families.facts import Facts, find, inside, layer_above, layer_index
from byway.core.families.fused import LAYOUTS
from byway.core.families.heads import AFTER_HEAD, TASK_HEADS
from byway.core.families.table import FAMILIES, Family, Kind
from byway.core.slots import base_modules, parent_path
from byway.core.weights import features, is_linear

__all__ = ["attention_windows", "facts", "input_embedding", "language_stacks", "outermost", "output_head", "pretrained_models"]

_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
_FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward|\bff\b|fc_?\d|fc_(in|out)|intermediate|linear_?\d|dense|\bw[io]|expert", re.IGNORECASE)
_ROUTER = re.compile(r"(router|gate)$", re.IGNORECASE)
_APART = re.compile(r"(^|\.)(gate|\w*(router|norm|adapter|hyper|bottleneck|inject)\w*)\.", re.IGNORECASE)
"""Containers of small maps beside the feed-forward part: routers, conditioned norms, hyper-connections."""
_LAST = re.compile(r"down|out|fc_?2$|w_?2$|wo$|lin_?2$|linear_?2$|4h_to_h|c_proj", re.IGNORECASE)
"""Names of the map that ends a feed-forward part, where its sizes do not tell."""
_USUAL_TARGETS = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q", "v"),
    ("query_key_value",),
    ("qkv_proj",),
    ("Wqkv",),
    ("c_attn",),
    ("qkv",),
)


def facts(model: nn.Module) -> Facts:
    """Return the facts of `model`: from the table if its family is known, else from its structure.

    Works on any module: a transformers model, a wrapper around one, several in one (stacks are then named after the
    part that contains them), or plain torch, of which little is known. Never fails: a missing fact is empty.
    """
    modules = dict(base_modules(model))
    towers = outermost(pretrained_models(modules))
    if len(towers) == 1:
        path, tower = towers[0]
        found = _pretrained(tower, path, modules)
        return replace(found, task_heads=(*found.task_heads, *_task_heads("", modules, ()))) if path else found
    if towers:
        return _merged("", towers, modules)
    return _from_structure(modules)


def output_head(model: Any) -> tuple[nn.Module, bool]:
    """Return (output embedding, True if something changes the logits after it), cheaply enough for every step.

    Raises:
        TargetError: the output embedding is not known.
    """
    utils = sys.modules.get("transformers.modeling_utils")
    if utils is not None and isinstance(model, utils.PreTrainedModel) and model.config.model_type in FAMILIES:
        head = model.get_output_embeddings()
        if isinstance(head, nn.Module):
            return head, _changes_logits(model.config.model_type, model.config)
    found = facts(model)
    return model.get_submodule(found.require("head")), found.after_head


def input_embedding(model: nn.Module) -> str | None:
    """Return the path of the module that embeds the model's input, or None if it cannot be told.

    A transformers model says which it is (of tokens, or of image patches); another must have exactly one embedding.
    """
    modules = dict(base_modules(model))
    towers = outermost(pretrained_models(modules))
    if not towers:
        found = [path for path, module in modules.items() if isinstance(module, nn.Embedding)]
        return found[0] if len(found) == 1 else None
    inputs: list[Any] = []
    for _, tower in towers:
        try:
            inputs.append(tower.get_input_embeddings())
        except NotImplementedError:  # it has several, or none
            continue
    found = [path for path, module in modules.items() if any(module is given for given in inputs)]
    return found[0] if len(found) == 1 else None


def attention_windows(model: Any) -> tuple[int, ...]:
    """Return the widths of the attention windows that the model's configuration names, in tokens."""
    values = model.config.get_text_config().to_dict()
    kinds = values.get("layer_types")
    if kinds and not any(str(kind).startswith(("sliding", "chunked")) for kind in kinds):
        return ()
    names = ("sliding_window", "local_attention", "attention_window", "window_size", "attention_window_size", "attention_chunk_size")
    found = (values.get(name) for name in names)
    return tuple(width for width in found if isinstance(width, int))


def language_stacks(model: Any) -> tuple[str, ...]:
    """Return the stacks of the model's text decoder, without those of vision and audio; empty if it has no decoder."""
    found = facts(model)
    roots = outermost(pretrained_models(dict(base_modules(model))))
    if len(roots) != 1 or "input_ids" not in inspect.signature(type(roots[0][1]).forward).parameters:
        return ()
    root, whole = roots[0]
    decoder = whole.get_decoder()
    path = next((_join(root, name) if name else root for name, module in base_modules(whole) if module is decoder), None)
    if path is None:
        return ()
    own = tuple(name for name, runner in found.stack_modules.items() if runner == path)
    return own or tuple(name for name, runner in found.stack_modules.items() if inside(runner, path))


def _join(root: str, path: str) -> str:
    return f"{root}.{path}" if root and path else root or path


def pretrained_models(modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Return those of `modules` that are transformers models."""
    utils = sys.modules.get("transformers.modeling_utils")  # such a model cannot exist unless this was imported
    return {} if utils is None else {p: m for p, m in modules.items() if isinstance(m, utils.PreTrainedModel)}


def outermost(modules: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return those of `modules` that are not inside another of them."""
    found: list[tuple[str, Any]] = []
    for path, module in modules.items():
        if not any(inside(path, other) for other, _ in found):
            found.append((path, module))
    return found


def _pretrained(model: Any, root: str, modules: Mapping[str, nn.Module]) -> Facts:
    """Return the facts of the transformers model at `root`; `modules`: all modules around and inside it, by path."""
    modules = {path: module for path, module in modules.items() if inside(path, root)}
    config = model.config
    row = FAMILIES.get(config.model_type)
    nested = {p: m for p, m in pretrained_models(modules).items() if p != root and m.config.model_type in FAMILIES}
    known = [] if row is not None else outermost(nested)
    if row is not None:
        found = _from_row(row, model, root, modules)
    elif known:
        found = replace(_merged(root, known, modules), model_type=config.model_type)
    else:
        found = replace(_from_structure(modules), model_type=config.model_type)
    embedding = model.get_output_embeddings()
    head = next((path for path, module in modules.items() if module is embedding), None)
    task_heads = _task_heads(root, modules, row.task_heads if row else ())
    if row is None and not known:
        found = replace(found, kind=_kind(model, found, head))
        if list(found.stacks) == ["layers"] and found.kind in ("encoder", "decoder", "vision"):
            name = "decoder" if found.kind == "decoder" else "encoder"
            found = replace(found, stacks={name: found.stacks["layers"]}, stack_modules={name: found.stack_modules["layers"]})
    trunk = _trunk(model, root, modules, bare=head is None and not task_heads)
    if row is not None and row.decoder_called_alone and list(found.stacks) == ["decoder"]:
        trunk = found.stack_modules["decoder"]
    # the table of positions may have a padding row, after which position ids start
    tables = (m for p, m in modules.items() if p.rpartition(".")[2] == "position_embeddings" and isinstance(m, nn.Embedding))
    types = {config.model_type, *(m.config.model_type for _, m in known)}
    return replace(
        found,
        trunk=trunk,
        head=head,
        task_heads=task_heads,
        after_head=head is not None and any(_changes_logits(t, config) for t in types),
        first_position=next((table.padding_idx + 1 for table in tables if table.padding_idx is not None), 0),
    )


def _trunk(model: Any, root: str, modules: Mapping[str, nn.Module], *, bare: bool) -> str | None:
    """Return the child that the class names, the root if `bare`, else the only model inside if there is one."""
    inner = _join(root, model.base_model_prefix)
    if model.base_model_prefix and inner in modules:
        return inner
    if bare:
        return root
    parts = [path for path, _ in outermost({p: m for p, m in pretrained_models(modules).items() if p != root})]
    return parts[0] if len(parts) == 1 else None


def _kind(model: Any, found: Facts, head: str | None) -> Kind:
    if model.config.is_encoder_decoder:
        return "encoder-decoder"
    if head is not None and re.search(r"ForCausalLM|LMHead", type(model).__name__):
        return "decoder"
    if head is not None and "ForMaskedLM" in type(model).__name__:
        return "encoder"
    return "vision" if model.main_input_name == "pixel_values" else found.kind


def _task_heads(root: str, modules: Mapping[str, nn.Module], further: tuple[str, ...]) -> tuple[str, ...]:
    names = TASK_HEADS | set(further)
    heads = [p for p in modules if p and p.rpartition(".")[0] == root and p.rpartition(".")[2] in names]
    # a "pooler" or "projector" is newly initialized only next to a head
    return tuple(heads) if any(h.rpartition(".")[2] in TASK_HEADS for h in heads) else ()


def _changes_logits(model_type: str, config: Any) -> bool:
    if model_type not in AFTER_HEAD:
        return False
    name, neutral = AFTER_HEAD[model_type]
    for values in (config.to_dict(), config.get_text_config().to_dict()):
        if name in values:
            return values[name] != neutral
    return True


def _from_row(row: Family, model: Any, root: str, modules: Mapping[str, nn.Module]) -> Facts:
    config = model.config
    inner = _join(root, model.base_model_prefix)
    start = inner if model.base_model_prefix and inner in modules else root
    stacks = {name: layers for name, pattern in row.stacks.items() if (layers := _layers(_join(start, pattern), modules))}
    index = layer_index(stacks)
    attention = _matching(row.attention, index, modules)
    feed_forward = _matching(row.feed_forward, index, modules)
    leaves = {path.rpartition(".")[2] for path in modules}
    first = {path.rpartition(".")[2]: path for path in reversed((*attention, *feed_forward))}
    values = config.to_dict()
    kind = row.kind
    if kind == "encoder-decoder" and len(stacks) == 1:
        kind = "encoder" if "encoder" in stacks else "decoder"
    elif kind == "encoder" and values.get("is_decoder"):
        kind = "decoder"
    return Facts(
        model_type=config.model_type,
        kind=kind,
        stack_modules={name: _runner(_join(start, row.stacks[name]), modules) for name in stacks},
        stacks=stacks,
        attention_linears=attention,
        feed_forward_linears=feed_forward,
        attention_outputs=_matching(row.attention[-1:], index, modules),
        feed_forward_outputs=_matching(row.feed_forward[-1:], index, modules),
        attention_modules=_matching(row.attention_modules, index, modules),
        feed_forward_modules=_matching(row.feed_forward_modules, index, modules),
        default_targets=tuple(name for name in row.targets if name in leaves),
        attention_registry=row.registry,
        fused={leaf: LAYOUTS[layout](config, features(modules[first[leaf]])[1]) for leaf, layout in row.fused.items() if leaf in first},
        parallel_blocks=row.parallel if isinstance(row.parallel, bool) else any(values.get(name) for name in row.parallel),
    )


def _layers(pattern: str, modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Return the children of every container that matches `pattern`, in order."""
    expression = find(pattern)
    containers = [path for path in modules if expression.fullmatch(path)]
    return tuple(f"{container}.{name}" for container in containers for name in modules[container]._modules)


def _runner(pattern: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the module that runs the layers of a stack: the parent of its first container."""
    outermost = find(pattern.split(".*")[0])
    return next(path for path in modules if outermost.fullmatch(path)).rpartition(".")[0]


def _matching(patterns: tuple[str, ...], index: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Return the paths below a layer that match one of `patterns`, in module order."""
    expressions = [find(pattern) for pattern in patterns]
    found: list[str] = []
    layer = None
    for path in modules:
        if path in index:
            layer = path
        elif layer is not None and path.startswith(f"{layer}."):
            rest = path[len(layer) + 1 :]
            if any(e.fullmatch(rest) for e in expressions):
                found.append(path)
    return tuple(found)


def _merged(root: str, towers: list[tuple[str, Any]], modules: Mapping[str, nn.Module]) -> Facts:
    """Return the facts of a model that contains several; stacks are named after the part they are in."""
    parts = {path: _pretrained(tower, path, modules) for path, tower in towers}
    stacks: dict[str, tuple[str, ...]] = {}
    runners: dict[str, str] = {}
    for path, part in parts.items():
        name = path.rpartition(".")[2]
        for stack, layers in part.stacks.items():
            key = name if len(part.stacks) == 1 else f"{name}.{stack}"
            stacks[key], runners[key] = layers, part.stack_modules[stack]
    linears = ("attention_linears", "feed_forward_linears", "attention_outputs", "feed_forward_outputs")
    lists = (*linears, "attention_modules", "feed_forward_modules")
    joined: dict[str, Any] = {fact: tuple(path for part in parts.values() for path in vars(part)[fact]) for fact in lists}
    decoders = [part for part in parts.values() if part.kind == "decoder"]
    return Facts(
        model_type="",
        kind="decoder" if len(decoders) == 1 else "unknown",
        stacks=stacks,
        stack_modules=runners,
        **joined,
        task_heads=_task_heads(root, modules, ()),
        attention_registry=all(part.attention_registry for part in parts.values()),
        fused={leaf: fused for part in parts.values() for leaf, fused in part.fused.items()},
    )


def _from_structure(modules: Mapping[str, nn.Module]) -> Facts:
    """Return the facts of an unknown model, whose stacks are lists of layers of one class with an attention."""
    attentions = {p: m for p, m in modules.items() if p and _is_attention(p, m)}
    lists = [p for p, m in modules.items() if isinstance(m, nn.ModuleList | nn.Sequential) and _is_stack(p, m, attentions)]
    inner = [p for p in lists if not any(inside(other, p) and other != p for other in lists)]
    groups: dict[str, list[str]] = {}
    for path in inner:
        groups.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", path), []).append(path)
    names = _stack_names(list(groups))
    stacks = {names[key]: tuple(f"{p}.{n}" for p in paths for n in modules[p]._modules) for key, paths in groups.items()}
    index = layer_index(stacks)
    layer_of = {p: layer_above(parent_path(p), index) for p in modules}
    within = [p for p in attentions if layer_of[p]]  # a layer's own class may be named after its attention (Pixtral)
    outer = [p for p in within if not any(inside(p, other) and other != p for other in within)]
    innermost = tuple(p for p in attentions if layer_of[p] and not any(inside(other, p) and other != p for other in attentions))
    in_torch = {p for p in modules if isinstance(modules.get(parent_path(p)), nn.MultiheadAttention)}
    linears = [p for p, m in modules.items() if is_linear(m) and p not in in_torch and layer_of[p]]
    attention = tuple(p for p in linears if any(inside(p, a) for a in outer))
    feed_forward = tuple(
        p for p in linears if p not in attention and _FEED_FORWARD.search(p[len(layer_of[p] or "") + 1 :]) and not _ROUTER.search(p)
    )
    leaves = {p.rpartition(".")[2] for p in attention}
    return Facts(
        model_type="",
        stacks=stacks,
        stack_modules={names[key]: key.split(".*")[0].rpartition(".")[0] for key in groups},
        attention_linears=attention,
        feed_forward_linears=feed_forward,
        feed_forward_outputs=_ends(feed_forward, attention, index, modules),
        attention_modules=innermost,
        default_targets=next((pair for pair in _USUAL_TARGETS if leaves.issuperset(pair)), ()),
        task_heads=_task_heads("", modules, ()),
        attention_registry=bool(innermost) and all(_registered(modules[p]) for p in innermost),
    )


def _ends(
    maps: tuple[str, ...], attention: tuple[str, ...], layers: Mapping[str, tuple[str, int]], modules: Mapping[str, nn.Module]
) -> tuple[str, ...]:
    """Return those of `maps` through which feed-forward parts write to the residual stream.

    Such a map leads from the inner width back to that of the layer, from which another map of the layer leads there.
    """
    layer_of = {path: str(layer_above(path, layers)) for path in (*maps, *attention)}
    widths: dict[str, int] = {}
    for path in reversed(attention):  # the layer's own, else (a cross-attention layer) that of its stack
        for key in (layer_of[path], layers[layer_of[path]][0]):
            widths[key] = features(modules[path])[0]
    sizes = {path: features(modules[path]) for path in maps if not _APART.search(path[len(layer_of[path]) + 1 :])}
    inside_of = {layer: {out for path, (_, out) in sizes.items() if layer_of[path] == layer} for layer in set(layer_of.values())}
    found: list[str] = []
    for path, (inner, outer) in sizes.items():
        layer = layer_of[path]
        back = outer == widths.get(layer, widths.get(layers[layer][0])) and (inner != outer or _LAST.search(path.rpartition(".")[2]))
        if back and {inner, 2 * inner} & inside_of[layer]:  # a fused map gives the gate too
            found.append(path)
    return tuple(found)


def _is_attention(path: str, module: nn.Module) -> bool:
    named = _ATTENTION.search(type(module).__name__) or _ATTENTION.search(path.rpartition(".")[2])
    return bool(named) and not isinstance(module, nn.ModuleList) and any(is_linear(m) for _, m in base_modules(module) if m is not module)


def _is_stack(path: str, module: nn.Module, attentions: Mapping[str, nn.Module]) -> bool:
    children = list(module._modules)
    return len({type(child) for child in module.children()}) == 1 and all(
        any(inside(a, f"{path}.{name}") and a != f"{path}.{name}" for a in attentions) for name in children
    )


def _stack_names(patterns: list[str]) -> dict[str, str]:
    """Name the stacks: an only one ``layers``, several by the first path segment in which they differ."""
    if len(patterns) == 1:
        return {patterns[0]: "layers"}
    split = [pattern.split(".") for pattern in patterns]
    depth = next((i for i in range(min(map(len, split), default=0)) if len({parts[i] for parts in split}) > 1), None)
    names = [parts[depth] for parts in split] if depth is not None else patterns
    return dict(zip(patterns, names if len(set(names)) == len(names) else patterns, strict=True))


def _registered(module: nn.Module) -> bool:
    """True if the file that defines the class of `module` uses transformers' registry of attention functions."""
    home = sys.modules.get(type(module).__module__)
    return home is not None and "ALL_ATTENTION_FUNCTIONS" in vars(home)
