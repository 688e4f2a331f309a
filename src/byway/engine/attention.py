"""The model's attention function, ours: the second seam, where prefixes and packed documents come in. No cache is ever touched.

``byway_sdpa`` and ``byway_eager`` are registered with transformers beside its own functions, each with a mask function (a name without one
gets no mask at all). They do what the function they are named after does, and two things more:

* side paths with :meth:`~byway.slots.SidePath.attend` rewrite keys, values, mask and position bias;
* a batch of packed documents (``cu_seq_lens_q``: where each begins, and the total) is attended document by document
  (:mod:`byway.engine.documents`), so that nothing leaks and changing one document leaves all others bit-equal. Restarted positions alone
  are no contract: transformers recognizes them for some models and calls, and leaks for others. Where documents have a head in common that
  stands in the row once (``prefix_spans``: for each segment the stretches of the row before it), a segment's keys are those stretches and
  its own.

Legend: b batch, h heads, g key/value heads, t queries, u keys, e head size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from byway.engine.documents import Call, attend, attend_documents
from byway.errors import AdapterError

if TYPE_CHECKING:
    pass

__all__ = ["Installed", "check", "install", "packed", "packing", "recorded", "restore"]

_PREFIX = "byway_"
_PLAIN = ("sdpa", "eager")
_PACKED: ContextVar[int | None] = ContextVar("byway_packed_batch", default=None)
"""The tokens of the longest document of a packed batch."""
_RECORD: ContextVar[dict[int, tuple[Tensor, Tensor]] | None] = ContextVar("byway_recorded_attention", default=None)


@dataclass
class Installed:
    """What :func:`install` has to put back."""

    previous: Any
    """A name, or names by sub-configuration."""
    handle: RemovableHandle


def check(model: nn.Module) -> Any:
    """The implementation that `model` uses now: a name, or ``{"": own, sub-configuration: ...}`` where it has parts with their own.

    Raises:
        AdapterError: the model is none of transformers', its attention does not go through transformers' registry, or it is neither
            sdpa nor eager.
    """
    from byway.families import facts

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not facts(model).attention_registry:
        raise AdapterError(f"the attention of {name} does not go through transformers' registry, so nothing can be put into it")
    previous = _renamed(_chosen(model.config), lambda own: own.removeprefix(_PREFIX))
    for own in _names(previous):
        if own not in _PLAIN:
            raise AdapterError(
                f"{name} attends with {own!r}; Byway's attention stands over sdpa and eager", "model.set_attn_implementation('sdpa')"
            )
    return previous


def install(model: nn.Module) -> Installed:
    """Make `model` attend through our function, over the one that it, or each part of it, uses now; refuses what :func:`check` refuses."""
    previous = check(model)
    assert isinstance(model, PreTrainedModel)
    model.set_attn_implementation(_renamed(previous, lambda own: _PREFIX + own))
    return Installed(previous, model.register_forward_pre_hook(_still_ours))


def restore(model: nn.Module, installed: Installed) -> None:
    """Undo :func:`install`; an implementation that the user has chosen since is left alone."""
    installed.handle.remove()
    if isinstance(model, PreTrainedModel) and str(model.config._attn_implementation).startswith(_PREFIX):
        model.set_attn_implementation(installed.previous)


def _chosen(config: Any) -> Any:
    """The implementation of a configuration; with sub-configurations a mapping, in the form that ``set_attn_implementation`` takes."""
    parts = {key: vars(config)[key] for key in config.sub_configs if vars(config).get(key) is not None}
    return {"": config._attn_implementation} | {key: _chosen(part) for key, part in parts.items()} if parts else config._attn_implementation


def _renamed(chosen: Any, rename: Callable[[str], str]) -> Any:
    """`chosen` with every name renamed; a part that has none (a backbone of another library) is left so."""
    if isinstance(chosen, dict):
        return {key: _renamed(part, rename) for key, part in chosen.items()}
    return None if chosen is None else rename(chosen)


def _names(chosen: Any) -> list[str]:
    if isinstance(chosen, dict):
        return [name for part in chosen.values() for name in _names(part)]
    return [] if chosen is None else [chosen]


def _still_ours(module: nn.Module, args: Any) -> None:
    implementation = str(module.config._attn_implementation)  # pyright: ignore[reportAttributeAccessIssue]
    if not implementation.startswith(_PREFIX):
        raise AdapterError(
            f"set_attn_implementation({implementation!r}) was called after attach: what Byway put into the attention would be dropped",
            "set the implementation before attaching (byway stands over sdpa and eager)",
        )


@contextmanager
def packing(model: nn.Module) -> Iterator[None]:
    """Within this context `model` attends through our function, so that packed batches can be passed to it."""
    from byway.engine.unpack import boundaries

    if isinstance(model, PreTrainedModel) and str(model.config._attn_implementation).startswith(_PREFIX):
        with boundaries(model):
            yield
        return
    installed = install(model)
    try:
        with boundaries(model):
            yield
    finally:
        restore(model, installed)


@contextmanager
def packed(longest: int | None = None) -> Iterator[None]:
    """Around one forward of a packed batch: no (t, u) mask over the whole pack is built, each document brings its own.

    `longest`: tokens of its longest document. Where attention is local, one is built all the same, unless each fits into the window.
    """
    token = _PACKED.set(sys.maxsize if longest is None else longest)
    try:
        yield
    finally:
        _PACKED.reset(token)


@contextmanager
def recorded() -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Within this context our attention function notes the keys and values (b, g, u, e) that it is given, by ``id(module)``."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    token = _RECORD.set(found)
    try:
        yield found
    finally:
        _RECORD.reset(token)


def _attention_over(plain: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Our function over transformers' `plain` one; called as ``(module, query, key, value, mask, **options)``."""

    def attention(
        module: nn.Module,
        query: Tensor,  # (b, h, t, e)
        key: Tensor,  # (b, g, u, e)
        value: Tensor,  # (b, g, u, e)
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not torch.compiler.is_compiling() and (record := _RECORD.get()) is not None:
            record[id(module)] = (key, value)
        starts_q, starts_k = options.pop("cu_seq_lens_q", None), options.pop("cu_seq_lens_k", None)
        before, read = options.pop("prefix_spans", None), options.pop("queries_read", None)
        for unused in ("max_length_q", "max_length_k"):
            options.pop(unused, None)
        function = ALL_ATTENTION_FUNCTIONS["sdpa"]
        if plain == "eager":  # each family has its own
            function = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        call = Call(function, module, options)
        if starts_q is None:
            return attend(call, query, key, value, attention_mask)
        return attend_documents(call, query, key, value, attention_mask, (starts_q, starts_k), before, read), None

    return attention


def _mask_over(plain: str) -> Callable[..., Any]:
    """The mask function of `plain`, which builds none for a packed batch, except where attention is local."""

    def mask(*args: Any, **options: Any) -> Any:
        # dynamo cannot read a ContextVar: compiled, the mask of the whole pack is built, and each document's part of it is its own
        longest = None if torch.compiler.is_compiling() else _PACKED.get()
        window = options.get("local_size")
        if longest is not None and (window is None or longest < window):
            return None
        return ALL_MASK_ATTENTION_FUNCTIONS[plain](*args, **options)

    return mask


for _name in _PLAIN:
    AttentionInterface.register(_PREFIX + _name, _attention_over(_name))
    AttentionMaskInterface.register(_PREFIX + _name, _mask_over(_name))
