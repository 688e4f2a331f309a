"""The quickstart's rows and how answers are scored: exact match, valid JSON, and accuracy per field.

The task is to turn a customer's message into one line of JSON::

    {"intent":"track","order":"48213","name":"Priya Nair"}

`intent` is one of :data:`INTENTS`; the other two values are copied from the message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from byway.errors import DataError, nearest

__all__ = ["FIELDS", "INTENTS", "PARTS", "SETTINGS", "SPLITS", "Row", "Score", "examples", "parse", "path", "prompt", "read", "score"]

INTENTS = ("track", "return", "damaged", "cancel", "address", "invoice")
FIELDS = ("intent", "order", "name")
SPLITS = ("train", "held_out", "hard")
PARTS: Mapping[str, str] = {
    "held_out": "same kind of wording as in training, new names and numbers: did the model learn the task?",
    "hard": "new wording (indirect, ironic, other openings): how far does it generalize?",
}
"""The two held-out splits, and what a score on each means."""
SETTINGS: Mapping[str, str] = {
    "before": "before",
    "before_with_examples": "before, 2 examples",
    "after": "after",
}
"""What is measured, in this order: the base model, given only the instruction; the base model, given two worked
examples as well; the adapter, given only the instruction."""
_OBJECT = re.compile(r"\{[^{}]*\}")


@dataclass(frozen=True)
class Row:
    """One row: the system instruction, the customer's message, and the answer (JSON text)."""

    instruction: str
    message: str
    answer: str

    @property
    def expected(self) -> dict[str, str]:
        """The answer's fields: `intent`, `order`, `name`."""
        return json.loads(self.answer)


@dataclass(frozen=True)
class Score:
    """Results on `rows` rows, as shares between 0 and 1.

    exact: the whole answer is valid, and all three fields equal the expected ones.
    valid: the whole answer is one JSON object with exactly the three fields, all strings.
    fields: share of correct values per field, read from the first JSON object anywhere in the answer. A model that adds
    text around correct values gets credit for them here, but not in `exact`.
    """

    rows: int
    exact: float
    valid: float
    fields: Mapping[str, float]


def path(split: str) -> Path:
    """Return the JSONL file of `split` (train, held_out or hard). Raises DataError for any other name."""
    if split not in SPLITS:
        raise DataError(f"the quickstart has no split {split!r}", hint=nearest(split, SPLITS) or f"there are: {', '.join(SPLITS)}")
    return Path(__file__).parent / f"{split}.jsonl"


def read(split: str) -> list[Row]:
    """Return the rows of `split`, in file order."""
    lines = path(split).read_text(encoding="utf-8").splitlines()
    return [Row(*(turn["content"] for turn in json.loads(line)["messages"])) for line in lines]


def examples(count: int = 2) -> list[Row]:
    """Return examples for a prompt: the first `count` training rows (0 to 6) whose intents all differ."""
    if not 0 <= count <= len(INTENTS):
        raise DataError(f"{count} examples with different intents requested", hint=f"request 0 to {len(INTENTS)}")
    chosen: dict[str, Row] = {}
    for row in read("train"):
        chosen.setdefault(row.expected["intent"], row)
    return list(chosen.values())[:count]


def prompt(row: Row, shown: Sequence[Row] = ()) -> list[dict[str, str]]:
    """Return the messages that ask for `row`'s answer: instruction, `shown` rows as earlier turns, message."""
    turns = [{"role": "system", "content": row.instruction}]
    for example in shown:
        turns += [{"role": "user", "content": example.message}, {"role": "assistant", "content": example.answer}]
    return [*turns, {"role": "user", "content": row.message}]


def parse(answer: str) -> dict[str, str] | None:
    """Return the fields if `answer` is one JSON object with exactly these keys and only string values, else None.

    The object may be surrounded by white space and its keys may be in any order. A repeated key makes it invalid.
    """
    members = _members(answer) or ()
    fields = {key: value for key, value in members if isinstance(value, str)}
    return fields if len(members) == len(FIELDS) and fields.keys() == set(FIELDS) else None


def score(answers: Sequence[str], rows: Sequence[Row]) -> Score:
    """Score one answer per row. Raises DataError if the counts differ or there are no rows."""
    if not rows or len(answers) != len(rows):
        raise DataError(f"{len(answers)} answers for {len(rows)} rows", hint="give one answer per row, in the order of the rows")
    expected = [row.expected for row in rows]
    parsed = [parse(answer) for answer in answers]
    found: list[dict[str, object]] = []
    for answer in answers:
        objects = (_members(candidate) for candidate in _OBJECT.findall(answer))
        found.append(dict(next((members for members in objects if members is not None), ())))
    total = len(rows)
    return Score(
        rows=total,
        exact=sum(got == want for got, want in zip(parsed, expected, strict=True)) / total,
        valid=sum(got is not None for got in parsed) / total,
        fields={f: sum(got.get(f) == want[f] for got, want in zip(found, expected, strict=True)) / total for f in FIELDS},
    )


class _Members(list[tuple[str, object]]):
    """The members of a JSON object, including repeated keys."""


def _members(text: str) -> _Members | None:
    """Return the members of the JSON object that `text` is, or None if it is anything else."""
    try:
        loaded = json.loads(text, object_pairs_hook=_Members)
    except (ValueError, RecursionError):  # a model may answer anything, such as very many opening brackets
        return None
    return loaded if isinstance(loaded, _Members) else None
