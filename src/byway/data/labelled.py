"""``labelled texts -> examples with a class``: single texts and pairs; labels are names or indices."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from byway.data.bad_rows import BadRow
from byway.data.control import Control
from byway.data.documents import Labelled
from byway.data.encode import Encoded
from byway.data.formats import Documents
from byway.data.report import Tally
from byway.errors import ConfigError, DataError, listed, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["LabelledExample", "class_names", "encode_labelled", "suspicious", "unlabelled"]


NUMBER = re.compile(r"[0-9]{1,9}(\.0+)?")
"""The index of a class, as text; tables write it with a decimal point if some cells of the column are empty."""
MOST_CLASSES = 10**5
MISSING = frozenset({"nan", "na", "n/a", "<na>", "nat", "null", "none"})
"""What programs write into a table for a missing value."""


@dataclass(frozen=True, slots=True)
class LabelledExample:
    """A text or pair with special tokens; ``token_type_ids`` (0 first, 1 second text) if the tokenizer writes them."""

    input_ids: list[int]
    label: int
    where: str
    token_type_ids: list[int] | None = None


def encode_labelled(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, max_length: int, names: Sequence[str], vocabulary_size: int | None = None
) -> Encoded[LabelledExample]:
    """Turn labelled documents into examples of at most `max_length` tokens (of a pair, the longer text is cut first).

    `names`: the classes in the order of their indices; see :func:`class_names`. `vocabulary_size`: of the model; a
    tokenizer with tokens added to it may write ids that it has not.

    Raises:
        ConfigError: `max_length` is too small.
        DataError: rows without a label or with one that is no class (all of them at once, unless `documents` skips bad
            rows), or no row is usable.
    """
    if max_length < 2:
        raise ConfigError(f"data.max_length is {max_length}; at least 2 tokens are needed")
    tally = Tally(documents.source, documents.format, max_length, documents.bad.copy())
    named = _are_names([row.label for row in documents.items if isinstance(row, Labelled)], names, documents.source)
    rows: list[tuple[Labelled, int]] = []
    for document in documents.items:
        if not isinstance(document, Labelled):
            raise DataError(f"{document.where}: the row has no label", hint="rows for classification need a text and a label")
        tally.rows += 1
        if reason := document.unusable():
            tally.drop(reason, document.where)
            continue
        try:
            rows.append((document, _index(str(document.label) if named else document.label, names)))
        except BadRow as error:
            tally.refuse(document.where, error)
    tally.bad.check()
    examples: list[LabelledExample] = []
    control = Control(tokenizer).pattern
    for start in range(0, len(rows), 512):
        chunk = rows[start : start + 512]
        for (document, label), found in zip(chunk, _tokenized([row for row, _ in chunk], tokenizer, control), strict=True):
            ids, types = found
            if vocabulary_size is not None and max(ids, default=0) >= vocabulary_size:
                wrong = next(index for index in ids if index >= vocabulary_size)
                reason = f"has the token id {wrong}; the vocabulary has {vocabulary_size} ids, 0 to {vocabulary_size - 1}"
                tally.refuse(document.where, BadRow(reason))
                continue
            tally.longest = max(tally.longest, len(ids))
            if len(ids) > max_length:
                tally.truncated += 1
                ids, types = _call(tokenizer, document.texts, control.search(" ".join(document.texts)) is not None, max_length)
            tally.used += 1
            tally.examples += 1
            tally.tokens += len(ids)
            tally.keys[hash((tuple(ids), label))] += 1
            examples.append(LabelledExample(ids, label, document.where, types))
    tally.bad.check()
    return Encoded(examples, tally.report(), frozenset(tally.keys))


def unlabelled(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[LabelledExample]:
    """Return texts, each of at most `max_length` tokens, as examples to classify, whose labels mean nothing."""
    control = Control(tokenizer).pattern
    found = [_call(tokenizer, (text,), control.search(text) is not None, max_length) for text in texts]
    return [LabelledExample(ids, 0, f"text {number}", types) for number, (ids, types) in enumerate(found, start=1)]


def class_names(rows: Sequence[Labelled]) -> tuple[str, ...]:
    """Return the classes that occur: names sorted (numbers by value); for indices, ``"0"`` to the largest."""
    names = {row.label for row in rows if isinstance(row.label, str)}
    numbers = {row.label for row in rows if isinstance(row.label, int)}
    if names and numbers and all(map(NUMBER.fullmatch, names)):  # 0 in one file, "0" in another
        numbers |= {int(float(name)) for name in names}
        names = set()
    if names and numbers:
        named = next(row for row in rows if isinstance(row.label, str))
        numbered = next(row for row in rows if isinstance(row.label, int))
        raise DataError(f"labels are both names and numbers: {named.where} has {named.label!r}, {numbered.where} has {numbered.label}")
    if numbers:
        if (most := max(numbers)) >= MOST_CLASSES:
            where = next(row.where for row in rows if float(row.label) == most)
            raise DataError(
                f"{where} has the label {most}; a number is the index of a class, so there would be {most + 1:,} classes",
                'if the numbers are names, write them as text ("17"); otherwise number the classes from 0',
            )
        return tuple(str(index) for index in range(max(numbers) + 1))
    if all(map(NUMBER.fullmatch, names)):
        return tuple(sorted(names, key=float))
    return tuple(sorted(names))


def _are_names(labels: Sequence[int | str], names: Sequence[str], source: str) -> bool:
    """True if the numbers among `labels` are names of classes, not indices: 1 and 2 where the classes are "1" and "2".

    Raises DataError if they could be both.
    """
    numbers = {label for label in labels if isinstance(label, int)}
    places = {number: list(names).index(str(number)) for number in numbers if str(number) in names}
    if len(places) < len(numbers) or all(number == place for number, place in places.items()):
        return False
    if all(0 <= number < len(names) for number in numbers):
        raise DataError(
            f"{source}: the labels {listed(map(str, numbers), 5)} are names of classes, and also the indices of others",
            f'the classes are {listed(names, 10)}: write labels as text, as in "{min(numbers)}"',
        )
    return True


def suspicious(names: Sequence[str]) -> list[str]:
    """Return remarks on names of classes that are probably one class, or none."""
    alike: dict[str, list[str]] = {}
    for name in names:
        letters = "".join(ch for ch in unicodedata.normalize("NFKC", name).casefold() if unicodedata.category(ch) != "Cf")
        alike.setdefault(" ".join(letters.split()), []).append(name)
    found = [f"classes that differ only in case or white space: {', '.join(map(ascii, same))}" for same in alike.values() if len(same) > 1]
    return found + [f"the class {name!r} looks like a missing label" for name in names if name.casefold() in MISSING]


def _index(label: int | str, names: Sequence[str]) -> int:
    if isinstance(label, int):
        if 0 <= label < len(names):
            return label
        unlabelled = "; -1 marks rows without a label" if label == -1 else ""
        raise BadRow(f"has the label {label}; there are {len(names)} classes, 0 to {len(names) - 1}{unlabelled}")
    if label not in names and NUMBER.fullmatch(label) and not any(map(NUMBER.fullmatch, names)):
        return _index(int(float(label)), names)  # the number of a class, as a table holds it
    if label not in names:
        raise BadRow(f"has the label {label!r}; {nearest(label, names) or 'there are ' + listed(names)}")
    return list(names).index(label)


def _tokenized(
    rows: Sequence[Labelled], tokenizer: PreTrainedTokenizerBase, control: re.Pattern[str]
) -> list[tuple[list[int], list[int] | None]]:
    """Tokenize ordinary rows in one call, and rows with control-token strings one by one, as text."""
    texts = [row.texts for row in rows]
    if len({len(entry) for entry in texts}) == 1 and not any(control.search(text) for entry in texts for text in entry):
        firsts, seconds = [entry[0] for entry in texts], [entry[1] for entry in texts if len(entry) > 1]
        found = tokenizer(firsts, seconds or None, return_attention_mask=False, verbose=False)
        types = found.get("token_type_ids")
        return [(list(ids), list(types[i]) if types is not None else None) for i, ids in enumerate(found["input_ids"])]
    return [_call(tokenizer, entry, any(control.search(text) for text in entry)) for entry in texts]


def _call(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], as_text: bool, max_length: int | None = None
) -> tuple[list[int], list[int] | None]:
    found = tokenizer(
        texts[0],
        texts[1] if len(texts) > 1 else None,
        truncation="longest_first" if max_length is not None else False,
        max_length=max_length,
        return_attention_mask=False,
        split_special_tokens=as_text,
        verbose=False,
    )
    types = found.get("token_type_ids")
    return list(found["input_ids"]), list(types) if types is not None else None
