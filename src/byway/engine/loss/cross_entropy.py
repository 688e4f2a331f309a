"""Cross-entropy over an output head without holding all logits: gradients are formed in the forward pass, in chunks.

    L = Σᵢ [lseᵢ − (1 − ε)·zᵢ[yᵢ] − ε·meanⱼ zᵢⱼ + c·lseᵢ²],   z = head(h),   lseᵢ = log Σⱼ exp zᵢⱼ
    dL/dzᵢⱼ = softmax(zᵢ)ⱼ·(1 + 2c·lseᵢ) − (1 − ε)·[j = yᵢ] − ε/v

For each chunk: logits, loss, dL/dz, and at once back through the head to dL/dh and to the trainable parameters of the
head. Then the logits are freed. Saved for the backward pass are only these gradients, which it multiplies by the
gradient of L. The head is called as a module: its hooks and side paths act, and its weight may be quantized. ε is the
label smoothing of :func:`torch.nn.functional.cross_entropy`, c the z-loss (PaLM, arXiv 2204.02311 §5).

Shapes: n labelled rows, d width, v vocabulary, r rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from byway.errors import ConfigError

__all__ = ["NLL", "LossTerms", "chunk_rows", "chunked_loss", "summed_loss", "trained_in"]

Head = Callable[[Tensor], Tensor]

_BUDGET = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
"""Bytes of one chunk's logits in float32; twice as much is held at a time. Larger chunks are not faster on a CPU."""
_FEWEST = {"cpu": 128, "cuda": 1024}
"""Fewest rows of a chunk; with fewer, reading the head's weight per chunk would limit the speed."""
_FLOAT16_SCALE = 16.0
"""float16 has no positive numbers below 6e-8, so dL/dz is scaled up by this until the backward pass."""


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """The terms of the loss besides −log p(label)."""

    label_smoothing: float = 0.0
    """ε in [0, 1]: the share of each target that is spread over the whole vocabulary."""
    z_loss: float = 0.0
    """c ≥ 0: adds c·(log Σ exp z)² per label, which keeps the normalizer Σ exp z near 1."""


NLL = LossTerms()


def summed_loss(logits: Tensor, targets: Tensor, terms: LossTerms = NLL) -> Tensor:
    """Return the loss summed over rows of `logits` (n, v) with `targets` (n,), at least float32. The plain twin."""
    logits = logits.to(_precise(logits.dtype))
    loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=terms.label_smoothing)
    return loss + terms.z_loss * logits.logsumexp(-1).square().sum() if terms.z_loss else loss


def chunked_loss(
    head: Head, hidden: Tensor, targets: Tensor, terms: LossTerms = NLL, *, trained: Sequence[Tensor] = (), rows: int = 128
) -> Tensor:
    """Return ``summed_loss(head(hidden), targets, terms)`` with at most `rows` rows of logits at a time.

    Args:
        head: (1, r, d) → (1, r, v), each row by itself; called once per chunk.
        hidden: (n, d).
        targets: (n,).
        trained: all tensors in `head` that may require a gradient (:func:`trained_in`). Tensors left out get none.
        rows: most rows of a chunk; chunks are made equally long.

    Raises:
        ConfigError: in the backward pass with ``create_graph``: second derivatives are not supported.
    """
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, *trained))
    if not wanted:
        return _walk(head, hidden, targets, terms, rows, (), with_hidden=False)[0]
    return _Chunked.apply(head, targets, terms, rows, hidden, *trained)


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Return the rows of a chunk on `device`: as many as the memory budget holds, at least :data:`_FEWEST`."""
    kind = device.type if device.type in _BUDGET else "cuda"
    return max(_FEWEST[kind], _BUDGET[kind] // (4 * vocabulary))


def trained_in(output: Tensor) -> tuple[Tensor, ...]:
    """Return the leaf tensors that get a gradient from `output`, found in its graph: any, not just parameters."""
    found: list[Tensor] = []
    nodes, seen = [output.grad_fn], set[Any]()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            found.append(node.variable)  # pyright: ignore[reportAttributeAccessIssue]
        nodes.extend(below for below, _ in node.next_functions)
    return tuple(found)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head: Head, targets: Tensor, terms: LossTerms, rows: int, hidden: Tensor, *trained: Tensor) -> Tensor:
        ctx.needed = ctx.needs_input_grad[4:]
        needed = [t for t, need in zip(trained, ctx.needed[1:], strict=True) if need]
        loss, ctx.scale, gradients = _walk(head, hidden, targets, terms, rows, needed, with_hidden=ctx.needed[0])
        ctx.dtypes = [t.dtype for t in needed]
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, *arrived: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph would silently treat the saved gradients as constants
            raise ConfigError(
                "the chunked loss forms its gradient in the forward pass, so it can be differentiated once only",
                "set engine.labels_only: off",
            )
        kept: tuple[Tensor | None, ...] = ctx.saved_tensors
        # kept in float32: rounded to the dtype of the gradients, the factor would bias all of them alike
        factor = arrived[0] / ctx.scale
        dtypes = iter(ctx.dtypes)
        hidden, *trained = kept
        own = iter(None if g is None else _times(g, factor, dtype) for g, dtype in zip(trained, dtypes, strict=True))
        given = (next(own) if need else None for need in ctx.needed[1:])
        return None, None, None, None, None if hidden is None else _times(hidden, factor, hidden.dtype), *given


def _times(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return (gradient.to(_precise(gradient.dtype)) * factor.to(gradient.device)).to(dtype)


def _walk(
    head: Head, hidden: Tensor, targets: Tensor, terms: LossTerms, rows: int, trained: Sequence[Tensor], *, with_hidden: bool
) -> tuple[Tensor, float, list[Tensor | None]]:
    """Return (loss, s, s times the gradients of `hidden` (n, d) and of each of `trained`; None if unused)."""
    hidden, count = hidden.detach(), len(hidden)
    rows = -(-count // -(-count // rows))
    losses: list[Tensor] = []
    scale = 1.0
    dhidden = torch.empty_like(hidden) if with_hidden else None
    sums: list[Tensor | None] = [None] * len(trained)
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        leaf = hidden[part][None].requires_grad_(with_hidden)  # (1, r, d)
        with torch.set_grad_enabled(with_hidden or bool(trained)):
            logits = head(leaf)  # (1, r, v)
        scale = _FLOAT16_SCALE if logits.dtype == torch.float16 else 1.0
        loss, slope = _slope(logits, targets[part].to(logits.device), terms, scale if logits.requires_grad else None)
        losses.append(loss)
        if slope is None:
            continue
        with torch.autocast(hidden.device.type, enabled=False):
            sources = [leaf, *trained] if with_hidden else trained
            found = list(torch.autograd.grad(logits, sources, slope, allow_unused=True))
        del logits, slope
        if dhidden is not None:
            own = found.pop(0)
            dhidden[part] = 0 if own is None else own[0]
        sums = [_plus(total, new) for total, new in zip(sums, found, strict=True)]
    return torch.stack(losses).sum(), scale, [dhidden, *sums]


def _slope(logits: Tensor, targets: Tensor, terms: LossTerms, scale: float | None) -> tuple[Tensor, Tensor | None]:
    """Return (loss, `scale`·dL/dz in the shape and dtype of the logits); the slope is None if `scale` is.

    It needs one buffer (r, v) besides the logits, which are not overwritten, because hooks may have kept them.
    """
    epsilon = terms.label_smoothing
    own = logits.detach().reshape(len(targets), -1)
    z = own.to(_precise(logits.dtype))  # (r, v)
    label = targets[:, None]
    top = z.amax(-1, keepdim=True)
    z = z - top if z is own else z.sub_(top)
    nll = -(1 - epsilon) * z.gather(-1, label) - (epsilon * z.mean(-1, keepdim=True) if epsilon else 0.0)
    total = z.exp_().sum(-1, keepdim=True)
    nll += total.log()
    lse = total.log() + top
    loss = (nll + terms.z_loss * lse.square() if terms.z_loss else nll).sum()
    if scale is None:
        return loss, None
    z.mul_(scale * (1 + 2 * terms.z_loss * lse) / total)
    if epsilon:
        z.sub_(scale * epsilon / z.shape[-1])
    z.scatter_add_(-1, label, torch.full_like(total, -scale * (1 - epsilon)))
    return loss, z.to(logits.dtype).view_as(logits)


def _plus(total: Tensor | None, new: Tensor | None) -> Tensor | None:
    """Add in float32 or float64. The first one is copied: autograd may return one tensor as two gradients."""
    if new is None:
        return total
    return new.to(_precise(new.dtype), copy=True) if total is None else total.add_(new)


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
