r"""Prefix tuning: K_l ← [Pk_l ; K_l], V_l ← [Pv_l ; V_l] in the attention of every layer l; [Pk ; Pv] = W2·tanh(W1·E + b1) + b2.

::

    E (P, d) ── Linear(d, m) ── tanh ── Linear(m, 2·L·g·e) ──┬── Pk_l (g, P, e)      layer l
                                                             └── Pv_l (g, P, e)       │ │
    x ── q, k, v (frozen) ──────────────────────────── attention over [Pk ; K], [Pv ; V] ── y
         real tokens at positions P, P+1, ...

P virtual tokens, L layers, g key heads of size e. Without the MLP (``hidden_size: none``) the keys and values are trained directly.
Source: Li and Liang, arXiv 2101.00190 §4 (their code: m = 512, P = 5, three prefixes for an encoder-decoder); on T5 with a relative bias of
0: Xie et al., arXiv 2201.05966.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from byway.methods.prefix.method import PrefixMethod

__all__ = ["CLASSIFYING", "PrefixTuning"]

CLASSIFYING = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""peft's task types whose prefixes are read as P-tuning v2."""


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(PrefixMethod):
    """Trained keys and values in front of the real ones in every attention; the sequence itself keeps its length.

    Trained: P·d + d·m + m + 2·L·g·e·(m + 1) numbers with the MLP, 2·L·P·g·e without; an encoder-decoder has three prefixes of its own
    (encoder, decoder, cross-attention).

    Raises:
        ConfigError: a value out of range.
        TargetError: attentions that the model does not have, or heads that cannot be told.
        AdapterError: a model whose attention does not go through transformers' registry.
    """

    @classmethod
    def reads_peft(cls, config: Mapping[str, Any]) -> bool:
        """peft has one name for both methods; a prefix with a classification head is read as P-tuning v2 (it computes the same)."""
        return super().reads_peft(config) and config.get("task_type") not in CLASSIFYING
