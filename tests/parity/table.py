"""The parity table: the twins of each method on each architecture, the measured cells, and mutants that must fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from byway import methods
from tests.methods.cases import REFUSED, method_of
from tests.parity import recorded
from tests.parity.cells import COLUMNS, Between, Cell, Cells, Setting, measure, together
from tests.parity.ladder import Narrow
from tests.parity.mutants import wrong_scale
from tests.parity.peft_twin import AsDoRA, Encoded, Peft
from tests.parity.plain import Beside, Plain, Prefixed, PromptAfterCls
from tests.parity.sizes import FAMILIES

SEED = 20261122


@dataclass(frozen=True)
class Comparison:
    """One comparison: the method with these fields against that twin."""

    twin: Any
    fields: dict[str, Any] = field(default_factory=dict)


Comparisons = Callable[[str], list[Comparison]]
"""Family → its comparisons (the worst one counts)."""

_PEFT_T5: dict[str, Any] = {"attentions": ("decoder",), "relative_bias": "earlier", "pairs": "interleaved"}


def _by(twin: Any) -> Comparisons:
    return lambda family: [Comparison(twin)]


def _prompt(twin: Any) -> Comparisons:
    def comparisons(family: str) -> list[Comparison]:
        if family in ("bert", "roberta"):
            return [Comparison(twin, {"placement": "first"}), Comparison(PromptAfterCls)]
        return [Comparison(twin)]

    return comparisons


def _prefix(twin: Any) -> Comparisons:
    def comparisons(family: str) -> list[Comparison]:
        if family == "t5":
            return [Comparison(twin, _PEFT_T5), Comparison(Prefixed)]
        return [Comparison(Prefixed if family == "vit" else twin)]

    return comparisons


@dataclass(frozen=True)
class Row:
    """The comparisons of one method."""

    comparisons: Comparisons
    reference: str
    recorded: tuple[str, ...] = ()
    """Recorded adapters of the adapters library that are compared as well."""


_PEFT = "HF peft, which reads our file; theirs is read back"
ROWS: dict[str, Row] = {
    "adalora": Row(_by(Peft), _PEFT),
    "bitfit": Row(_by(Plain), "transformers' own biases, trained in place (added where there is none)"),
    "bottleneck_adapter": Row(
        _by(Beside),
        "small networks put on transformers' own modules by hand, layer norms trained in place; outputs and files of the adapters library "
        "(recorded: Houlsby, Pfeiffer, attention only, cross-attention)",
        ("double_seq_bn", "seq_bn", "attention_only", "double_cross"),
    ),
    "dora": Row(_by(Peft), _PEFT),
    "full": Row(_by(Plain), "transformers' own tensors, trained in place"),
    "ia3": Row(_by(Peft), _PEFT),
    "ladder_side_tuning": Row(
        _by(Narrow), "a narrow transformers model of the same class with the side blocks' tensors; greedy decoding without a cache"
    ),
    "layer_norm": Row(_by(Peft), _PEFT),
    "lora": Row(_by(Peft), _PEFT),
    "p_tuning": Row(
        _prompt(Encoded), f"{_PEFT}; torch's LSTM as the encoder, by the chain rule; behind [CLS]: `inputs_embeds` put together by hand"
    ),
    "p_tuning_v2": Row(_prefix(Peft), f"{_PEFT}; ViT and the three prefixes of T5: an attention function written out by hand"),
    "parallel_adapter": Row(
        _by(Beside),
        "small networks put beside transformers' own modules by hand; outputs and files of the adapters library (recorded: parallel, and "
        "with a learned scale and an own norm)",
        ("par_bn", "par_learned"),
    ),
    "prefix_tuning": Row(
        _prefix(Encoded),
        f"{_PEFT}; the MLP written again, by the chain rule; ViT and the three prefixes of T5: an attention function written out by hand",
    ),
    "prompt_tuning": Row(_prompt(Peft), f"{_PEFT}; behind [CLS]: `inputs_embeds` put together by hand"),
    "weight_chain": Row(_by(AsDoRA), "HF peft's DoRA with the chain's tensors"),
}


def reason(method: str, family: str) -> str:
    """Return why there is no cell at all; empty if there is one."""
    return "ViT reads no tokens, so there is no place for virtual ones (refused with an error)" if (method, family) in REFUSED else ""


def cells(method: str, family: str, seed: int = SEED, between: Between | None = None) -> Cells:
    """Measure the four cells of a method on a family, each the worst of its comparisons."""
    if reason(method, family):
        return dict.fromkeys(COLUMNS, Cell(reason=reason(method, family)))
    row, at = ROWS[method], Setting(family, seed)
    found = [measure(method_of(method, **one.fields), at, one.twin, between=between) for one in row.comparisons(family)]
    if row.recorded and family in recorded.R.MODELS:
        found += recorded.measure(family, row.recorded, between)
    return together(found, max if between is None else min)


def mutant(method: str, family: str, seed: int = SEED) -> Cells:
    """Measure the cells with a wrong scale; each is the comparison that reacts least."""
    return cells(method, family, seed, wrong_scale)


NAMES = tuple(sorted(methods.names()))
PAIRS = [(method, family) for method in NAMES for family in FAMILIES]
