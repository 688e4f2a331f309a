"""The model's attention function, ours: the second seam, where prefixes and packed documents come in. No cache is ever touched.

``byway_sdpa`` and ``byway_eager`` are registered with transformers beside its own functions, each with a mask function (a name without one
gets no mask at all). They do what the function they are named after does, and let side paths with
:meth:`~byway.core.slots.SidePath.attend` rewrite keys, values, mask and position bias. ``byway_packed_sdpa`` and ``byway_packed_eager``
(:mod:`byway.engine.attention.packing`) do the same, and
a packed batch (``cu_seq_lens_q``: where each document begins, and the total) is attended document by document. Where documents have a head
in common that stands in the row once (``prefix_spans``: for each segment the stretches of the row before it), a segment's keys are those
stretches and its own.

Legend: b batch, h heads, g key/value heads, t queries, u keys, e head size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from byway.core.slots import Slot, slot_of
from byway.errors import AdapterError

__all__ = [
    "PACKED_PREFIX",
    "Call",
    "Installed",
    "as_additive",
    "attend",
    "check",
    "chosen",
    "install",
    "is_installed",
    "packed",
    "recorded",
    "register",
    "renamed",
    "restore",
]

_PREFIX = "byway_"
PACKED_PREFIX = "byway_packed_"
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
    from byway.core.families import facts

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not facts(model).attention_registry:
        raise AdapterError(f"the attention of {name} does not go through transformers' registry, so nothing can be put into it")
    previous = renamed(chosen(model.config), lambda own: own.removeprefix(PACKED_PREFIX).removeprefix(_PREFIX))
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
    model.set_attn_implementation(renamed(previous, lambda own: _PREFIX + own))
    return Installed(previous, model.register_forward_pre_hook(_still_ours))


def restore(model: nn.Module, installed: Installed) -> None:
    """Undo :func:`install`; an implementation that the user has chosen since is left alone."""
    installed.handle.remove()
    if isinstance(model, PreTrainedModel) and str(model.config._attn_implementation).startswith(_PREFIX):
        model.set_attn_implementation(installed.previous)


def chosen(config: Any) -> Any:
    """The implementation of a configuration; with sub-configurations a mapping, in the form that ``set_attn_implementation`` takes."""
    parts = {key: vars(config)[key] for key in config.sub_configs if vars(config).get(key) is not None}
    return {"": config._attn_implementation} | {key: chosen(part) for key, part in parts.items()} if parts else config._attn_implementation


def renamed(implementation: Any, rename: Callable[[str], str]) -> Any:
    """`implementation` with every name renamed; a part that has none (a backbone of another library) is left so."""
    if isinstance(implementation, dict):
        return {key: renamed(part, rename) for key, part in implementation.items()}
    return None if implementation is None else rename(implementation)


def _names(implementation: Any) -> list[str]:
    if isinstance(implementation, dict):
        return [name for part in implementation.values() for name in _names(part)]
    return [] if implementation is None else [implementation]


def is_installed(model: nn.Module) -> bool:
    """True if `model` attends through our function."""
    return isinstance(model, PreTrainedModel) and str(model.config._attn_implementation).startswith(_PREFIX)


def _still_ours(module: nn.Module, args: Any) -> None:
    implementation = str(module.config._attn_implementation)  # pyright: ignore[reportAttributeAccessIssue]
    if not implementation.startswith(_PREFIX):
        raise AdapterError(
            f"set_attn_implementation({implementation!r}) was called after attach: what Byway put into the attention would be dropped",
            "set the implementation before attaching (byway stands over sdpa and eager)",
        )


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


Documents = Callable[["Call", Tensor, Tensor, Tensor, "Tensor | None", tuple[Any, Any], Any, Any], Tensor]
"""Attends packed documents: (call, query, key, value, mask, bounds, prefix spans, queries read) → (b, t, h, e)."""


def register(prefix: str, documents: Documents) -> None:
    """Register ``<prefix>sdpa`` and ``<prefix>eager`` with transformers; a packed batch goes to `documents`."""
    for plain in _PLAIN:
        AttentionInterface.register(prefix + plain, _attention_over(plain, documents))
        AttentionMaskInterface.register(prefix + plain, _mask_over(plain))


def _attention_over(plain: str, documents: Documents) -> Callable[..., tuple[Tensor, Tensor | None]]:
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
        return documents(call, query, key, value, attention_mask, (starts_q, starts_k), before, read), None

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


@dataclass(frozen=True)
class Call:
    """The attention function that is called, for whom, and with what besides queries, keys and values."""

    function: Callable[..., tuple[Tensor, Tensor | None]]
    module: nn.Module
    options: dict[str, Any]

    @property
    def causal(self) -> bool:
        said = self.options.get("is_causal")
        return bool(vars(self.module).get("is_causal", True) if said is None else said)

    @property
    def eager(self) -> bool:
        """It adds a mask to its scores and knows nothing else of causality."""
        return self.function is not ALL_ATTENTION_FUNCTIONS["sdpa"]

    @property
    def bare(self) -> bool:
        """It is sdpa of queries, keys and values alone."""
        # sdpa itself refuses a softcap
        plain = not self.eager and self.options.get("position_bias") is None and self.options.get("softcap") is None
        return plain and self.slot is None and not torch.compiler.is_compiling()

    @property
    def slot(self) -> Slot | None:
        """The side paths that act on it."""
        slot = slot_of(self.module)
        return None if slot is None or not slot.attends or slot.silent() else slot

    def scale(self, query: Tensor) -> float:
        said = self.options.get("scaling")
        return query.shape[-1] ** -0.5 if said is None else float(said)

    def plain(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **other: Any) -> Tensor:
        """(b, t, h, e); `other` in place of the options of that name."""
        return attend(Call(self.function, self.module, {**self.options, **other}), query, key, value, mask)[0]


def attend(call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One plain call, after every active side path of its module has rewritten keys, values, mask and bias."""
    slot, options = call.slot, dict(call.options)
    if slot is None:
        return call.function(call.module, query, key, value, mask, **options)
    additive = mask is not None and mask.dtype != torch.bool
    seen = mask > torch.finfo(mask.dtype).min / 2 if mask is not None and additive else mask
    # what an additive mask says beyond seen or unseen: the relative positions of Swin and BEiT
    offset = mask.masked_fill(~seen, 0) if mask is not None and seen is not None and additive else None
    if seen is None and call.causal and query.shape[2] > 1:
        t, u = query.shape[2], key.shape[2]
        # as torch's own causal kernel counts, from the first key: a static cache has room behind the last query
        seen = torch.ones(t, u, dtype=torch.bool, device=query.device).tril()[None, None]
    bias = options.pop("position_bias", None)
    for side in slot.attends:
        key, value, seen, bias = side.attend(query, key, value, seen, bias)
    if bias is not None:
        options["position_bias"] = bias
    if seen is None or not (additive or call.eager):
        return call.function(call.module, query, key, value, seen, **options)
    mask = as_additive(seen, query.dtype)
    if offset is not None:
        # keys are only ever added in front
        mask = mask + F.pad(offset, (mask.shape[-1] - offset.shape[-1], 0))
    return call.function(call.module, query, key, value, mask, **options)


def as_additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """True/False → 0 / the lowest number, which eager attention adds to its scores."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def _outside_packing(*_: Any) -> Tensor:
    raise AdapterError(
        "a packed batch (cu_seq_lens_q) was passed outside packing(model)", "with byway.engine.attention.packing.packing(model): ..."
    )


register(_PREFIX, _outside_packing)
