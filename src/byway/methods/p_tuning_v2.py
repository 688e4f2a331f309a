r"""P-tuning v2: K_l ← [drop(Pk_l) ; K_l], V_l ← [drop(Pv_l) ; V_l] in every layer l of an encoder, and a trained head.

::

    P (P, 2·L·g·e) ── drop ──┬── Pk_l, Pv_l      every layer l
                             ▼
    [CLS] x1 x2 ... ── attention over [Pk ; K], [Pv ; V] ── ... ── h[CLS] ── head (trained) ── classes
                                                             └──── h_t  ── head (trained) ── tags

P virtual tokens, L layers, g key heads of size e. The head reads the real tokens. With the projection
(``hidden_size: 512``) P is computed from an embedding (P, d) by Linear(d, m), tanh, Linear(m, 2·L·g·e).
Source: Liu et al., arXiv 2110.07602 §3 (their code: P = 4, dropout 0.1, N(0, 1), no projection).
"""

from __future__ import annotations

from dataclasses import dataclass

from byway.core.fields import Dropout
from byway.methods.prefix.method import Init, PrefixMethod, Size
from byway.methods.prefix.peft import PrefixPeftFormat

__all__ = ["PTuningV2"]


@dataclass(frozen=True, kw_only=True)
class PTuningV2(PrefixMethod):
    """Deep prompts: trained keys and values in every layer, and a trained head; [CLS] stays first in the sequence.

    Trainable parameters: 2·L·P·g·e (with the projection, P·d + d·m + m + 2·L·g·e·(m + 1)), and the head.

    Raises:
        ConfigError: a value out of range.
        TargetError: the model has no such attentions, or their heads cannot be determined.
        AdapterError: the model's attention does not go through transformers' registry.
    """

    num_virtual_tokens: Size = 4
    """P: number of trained keys and values in front of the real ones, in every layer (the paper uses 4 to 128,
    depending on the task)."""
    hidden_size: Size | None = None
    """m: width of the MLP (Linear(d, m), tanh, Linear(m, ·)) that computes the keys and values from an embedding (the
    paper's projection: 512); null: train the keys and values directly."""
    dropout: Dropout = 0.1
    """Dropout probability on the trained keys and values."""
    init: Init = "normal"
    """Initial keys and values: ``normal`` N(0, 1) (as the paper's code), ``random`` N(0, 0.02²), or ``zero``. With an
    MLP, ``normal`` and ``random`` give its embedding N(0, 1) and its maps torch's default; ``zero`` makes all keys and
    values 0."""

    peft = PrefixPeftFormat(classifying=True)
