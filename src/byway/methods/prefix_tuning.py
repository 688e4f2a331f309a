r"""Prefix tuning: K_l ← [Pk_l ; K_l], V_l ← [Pv_l ; V_l] in every layer l, with [Pk ; Pv] = W2·tanh(W1·E + b1) + b2.

::

    E (P, d) ── Linear(d, m) ── tanh ── Linear(m, 2·L·g·e) ──┬── Pk_l (g, P, e)      layer l
                                                             └── Pv_l (g, P, e)       │ │
    x ── q, k, v (frozen) ──────────────────────────── attention over [Pk ; K], [Pv ; V] ── y
         real tokens at positions P, P+1, ...

P virtual tokens, L layers, g key heads of size e. Without the MLP (``hidden_size: null``) the keys and values are
trained directly. Source: Li and Liang, arXiv 2101.00190 §4 (their code: m = 512, P = 5, three prefixes for an
encoder-decoder); on T5 with a relative position bias of 0: Xie et al., arXiv 2201.05966.
"""

from __future__ import annotations

from dataclasses import dataclass

from byway.methods.prefix.method import PrefixMethod
from byway.methods.prefix.peft import PrefixPeftFormat

__all__ = ["PrefixTuning"]


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(PrefixMethod):
    """Trained keys and values in front of the real ones in every attention; the sequence keeps its length.

    Trainable parameters: P·d + d·m + m + 2·L·g·e·(m + 1) with the MLP, 2·L·P·g·e without. An encoder-decoder has three
    prefixes (encoder, decoder, cross-attention).

    Raises:
        ConfigError: a value out of range.
        TargetError: the model has no such attentions, or their heads cannot be determined.
        AdapterError: the model's attention does not go through transformers' registry.
    """

    peft = PrefixPeftFormat(classifying=False)
