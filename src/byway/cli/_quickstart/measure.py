"""Exact match and accuracy per field for the quickstart's job: a customer's message in, one line of JSON out.

An answer is ``{"intent":"track","order":"48213","name":"Priya Nair"}``: `intent` is one of :data:`INTENTS`, the others are copied from
the message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from byway.errors import DataError, nearest

__all__ = ["FIELDS", "INTENTS", "SPLITS", "Row", "Score", "examples", "parse", "path", "prompt", "read", "score"]

INTENTS = ("track", "return", "damaged", "cancel", "address", "invoice")
FIELDS = ("intent", "order", "name")
SPLITS = ("train", "held_out", "hard")
_FIRST_OBJECT = re.compile(r"\{[^{}]*\}")


@dataclass(frozen=True)
class Row:
    """One row as it was written: the system instruction, the customer's message, the answer (JSON text)."""

    instruction: str
    message: str
    answer: str

    @property
    def expected(self) -> dict[str, str]:
        """The answer's fields: `intent`, `order`, `name`."""
        return json.loads(self.answer)


@dataclass(frozen=True)
class Score:
    """How many of `rows` answers are right, as shares between 0 and 1.

    exact: the whole answer is valid, and all three fields are equal to the expected ones.
    valid: the whole answer is one JSON object with exactly the three fields, all strings.
    fields: per field, the share that is right, read from the first JSON object anywhere in the answer; so a model that wraps good values
    in talk is credited with them here, though not in `exact`.
    """

    rows: int
    exact: float
    valid: float
    fields: Mapping[str, float]


def path(split: str) -> Path:
    """The JSONL file of `split` (train, held_out, hard), as shipped; raises DataError for another name."""
    if split not in SPLITS:
        raise DataError(f"the quickstart has no split {split!r}", hint=nearest(split, SPLITS) or f"there are: {', '.join(SPLITS)}")
    return Path(__file__).parent / f"{split}.jsonl"


def read(split: str) -> list[Row]:
    """The rows of `split`, in file order."""
    rows = []
    for line in path(split).read_text(encoding="utf-8").splitlines():
        system, user, assistant = json.loads(line)["messages"]
        rows.append(Row(system["content"], user["content"], assistant["content"]))
    return rows


def examples(count: int = 2) -> list[Row]:
    """The first `count` training rows whose intents all differ (at most six): examples to show in a prompt, the same ones each time."""
    if not 0 <= count <= len(INTENTS):
        raise DataError(f"{count} examples with different intents asked for", hint=f"ask for 0 to {len(INTENTS)}")
    chosen: dict[str, Row] = {}
    for row in read("train"):
        chosen.setdefault(row.expected["intent"], row)
    return list(chosen.values())[:count]


def prompt(row: Row, shown: Sequence[Row] = ()) -> list[dict[str, str]]:
    """The messages that ask for `row`'s answer: the instruction, `shown` rows as earlier turns with their answers, then the message."""
    turns = [{"role": "system", "content": row.instruction}]
    for example in shown:
        turns += [{"role": "user", "content": example.message}, {"role": "assistant", "content": example.answer}]
    return [*turns, {"role": "user", "content": row.message}]


def parse(answer: str) -> dict[str, str] | None:
    """The three fields of an answer that is one JSON object and nothing else (white space around it is allowed); otherwise None.

    A missing, further or repeated key, and a value that is not a string, make it invalid. The order of the keys does not matter.
    """
    pairs = _pairs(answer)
    if pairs is None or sorted(key for key, _ in pairs) != sorted(FIELDS):
        return None
    fields = {key: value for key, value in pairs if isinstance(value, str)}
    return fields if len(fields) == len(FIELDS) else None


def score(answers: Sequence[str], rows: Sequence[Row]) -> Score:
    """Compare one answer per row with the expected one; raises DataError when the counts differ or there is no row."""
    if not rows or len(answers) != len(rows):
        raise DataError(f"{len(answers)} answers for {len(rows)} rows", hint="give one answer per row, in the order of the rows")
    wanted = [row.expected for row in rows]
    strict = [parse(answer) for answer in answers]
    found = [_first_object(answer) for answer in answers]
    total = len(rows)
    return Score(
        rows=total,
        exact=sum(got == want for got, want in zip(strict, wanted, strict=True)) / total,
        valid=sum(got is not None for got in strict) / total,
        fields={f: sum(got.get(f) == want[f] for got, want in zip(found, wanted, strict=True)) / total for f in FIELDS},
    )


def _pairs(text: str) -> list[tuple[str, object]] | None:
    """The members of the one flat JSON object that `text` is, repeated keys kept; None when it is anything else."""
    try:
        loaded = json.loads(text, object_pairs_hook=_Members)
    except (ValueError, RecursionError):  # an answer may be any text; not being JSON is a finding, not a failure
        return None
    return loaded.pairs if isinstance(loaded, _Members) else None


class _Members:
    """A JSON object as the list of its members, so that a repeated key is seen rather than overwritten."""

    def __init__(self, pairs: list[tuple[str, object]]) -> None:
        self.pairs = pairs


def _first_object(answer: str) -> dict[str, object]:
    """The first flat JSON object inside `answer`, or an empty one."""
    for candidate in _FIRST_OBJECT.findall(answer):
        pairs = _pairs(candidate)
        if pairs is not None:
            return dict(pairs)
    return {}
