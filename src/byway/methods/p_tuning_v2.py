r"""P-tuning v2: K_l ← [drop(Pk_l) ; K_l], V_l ← [drop(Pv_l) ; V_l] in every layer l of an encoder, and a trained head on the real tokens.

::

    P (P, 2·L·g·e) ── drop ──┬── Pk_l, Pv_l      every layer l
                             ▼
    [CLS] x1 x2 ... ── attention over [Pk ; K], [Pv ; V] ── ... ── h[CLS] ── head (trained) ── classes
                                                             └──── h_t  ── head (trained) ── tags

P virtual tokens, L layers, g key heads of size e. With the projection (``hidden_size: 512``) P comes from an embedding (P, d) through
Linear(d, m), tanh, Linear(m, 2·L·g·e). Source: Liu et al., arXiv 2110.07602 §3 (their code: P = 4, dropout 0.1, N(0, 1), no projection).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from byway.methods.prefix.method import Init, PrefixMethod
from byway.methods.prefix_tuning import CLASSIFYING

__all__ = ["PTuningV2"]


@dataclass(frozen=True, kw_only=True)
class PTuningV2(PrefixMethod):
    """Deep prompts: trained keys and values in every layer, beside a trained head; the real [CLS] stays the first of the sequence.

    Trained: 2·L·P·g·e numbers (with the projection P·d + d·m + m + 2·L·g·e·(m + 1)), and the head.

    Raises:
        ConfigError: a value out of range.
        TargetError: attentions that the model does not have, or heads that cannot be told.
        AdapterError: a model whose attention does not go through transformers' registry.
    """

    num_virtual_tokens: int = 4
    """P: how many keys and values are put in front, in each layer (the paper's tasks use 4 to 128)."""
    hidden_size: int | None = None
    """m: the keys and values are made by an MLP, Linear(d, m), tanh, Linear(m, ·), from an embedding (the paper's projection, 512);
    none: they are trained directly."""
    dropout: float = 0.1
    """Dropout on the trained keys and values, in [0, 1)."""
    init: Init = "normal"
    """How keys and values start that are trained directly: ``normal`` N(0, 1) (as the paper's code), ``random`` N(0, 0.02²), ``zero``; an
    MLP starts from N(0, 1) and its maps' usual range, with ``zero`` from all keys and values 0."""

    @classmethod
    def reads_peft(cls, config: Mapping[str, Any]) -> bool:
        """peft has one name for both methods; a prefix with a classification head is read as P-tuning v2."""
        return super().reads_peft(config) and config.get("task_type") in CLASSIFYING
