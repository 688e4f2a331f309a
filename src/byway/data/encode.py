"""``documents -> examples``: token ids and labels, with a report of what was truncated or dropped, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, get_args

from byway.data.bad_rows import BadRow
from byway.data.documents import Completion, Conversation, Document, Labelled, Text, Tokens
from byway.data.formats import Documents
from byway.data.report import DataReport, Tally
from byway.data.template import ChatTemplate, Learn, Piece
from byway.data.tokens import IGNORED, Tokenizer
from byway.errors import ConfigError, DataError, listed, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoded", "Example", "Overflow", "encode"]

Overflow = Literal["truncate", "drop", "split"]
CHUNK = 256
"""Documents tokenized in one call of the tokenizer."""
E = TypeVar("E")


@dataclass(frozen=True, slots=True)
class Example:
    """Tokens of a row. ``labels``: -100 for tokens not in the loss, unshifted (label i is the token at i)."""

    input_ids: list[int]
    labels: list[int]
    where: str


@dataclass(frozen=True)
class Encoded(Generic[E]):
    """Examples in the order of the rows. ``keys``: hashes of their contents, to find those that two sets share."""

    examples: list[E]
    report: DataReport
    keys: frozenset[int] = field(default_factory=frozenset, repr=False)


def encode(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int,
    learn: Learn = "responses",
    overflow: Overflow = "truncate",
    template: str | None = None,
    variables: Mapping[str, Any] | None = None,
    vocabulary_size: int | None = None,
) -> Encoded[Example]:
    """Turn documents into examples for next-token prediction.

    Args:
        tokenizer: None only for rows of token ids.
        learn: what is in the loss: the assistant's turns with their end-of-turn tokens (``responses``), the last
            message alone (``last``) or every token (``all``). Of a text all tokens are, of a prompt/completion pair the
            completion and the end token.
        overflow: examples longer than `max_length` tokens are cut at the end, dropped, or split into windows of that
            length.
        template: Jinja text or a ``.jinja`` file in place of the tokenizer's chat template.
        variables: variables for the template; those of a row come first.
        vocabulary_size: of the model; default: the tokenizer's.

    Raises:
        ConfigError: options that cannot be used, or no tokenizer.
        DataError: bad rows (all of them at once, unless `documents` skips them), or no row is usable.
    """
    for key, value, options in (("learn", learn, get_args(Learn)), ("overflow", overflow, get_args(Overflow))):
        if value not in options:
            raise ConfigError(f"data.{key} is {value!r}", hint=nearest(value, options) or f"it must be one of {listed(options)}")
    if max_length < 2:
        raise ConfigError(f"data.max_length is {max_length}; at least 2 tokens are needed to predict one from the other")
    if vocabulary_size is None and tokenizer is not None:
        vocabulary_size = len(tokenizer)
    tally = Tally(documents.source, documents.format, max_length, documents.bad.copy())
    encoder = _Encoder(tokenizer, tally, learn, overflow, template, variables or {}, vocabulary_size)
    examples: list[Example] = []
    for start in range(0, len(documents.items), CHUNK):
        examples += encoder.chunk(documents.items[start : start + CHUNK])
    tally.bad.check()
    return Encoded(examples, tally.report(), frozenset(tally.keys))


@dataclass
class _Encoder:
    """The state of one :func:`encode` call."""

    own: PreTrainedTokenizerBase | None
    tally: Tally
    learn: Learn
    overflow: Overflow
    template: str | None
    variables: Mapping[str, Any]
    vocabulary_size: int | None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The examined tokenizer; only rows of token ids do without one."""
        if self.own is None:
            raise ConfigError(
                "the base has no tokenizer, so text cannot be encoded", hint="use rows of input_ids, or a base with a tokenizer"
            )
        return Tokenizer(self.own)

    @cached_property
    def chat(self) -> ChatTemplate:
        """The examined chat template."""
        found = ChatTemplate(self.tokenizer.own, self.template, self.learn, self.variables)
        if not found.ends_turns:
            self.tally.note("the chat template writes no end-of-turn token after an answer, so the model cannot learn to stop")
        return found

    def chunk(self, documents: list[Document]) -> Iterator[Example]:
        """Yield the examples of some documents, in order; count every row that gives none."""
        ready: list[tuple[Document, Sequence[Piece | Tokens]]] = []
        talks = [document for document in documents if isinstance(document, Conversation) and not document.unusable()]
        written = iter(self.chat.pieces(talks) if talks else ())
        if talks:
            self.tally.ignored = self.chat.ignored
        for document in documents:
            self.tally.rows += 1
            reason = document.unusable()
            talk = isinstance(document, Conversation)
            made = [] if reason else next(written) if talk else self._ready(document)
            if isinstance(made, BadRow):
                self.tally.refuse(document.where, made)
                continue
            if talk and len(made) > 1:
                self.tally.note(
                    "the chat template rewrites earlier turns, so some conversations became several examples, each as it is served"
                )
            if made:
                ready.append((document, made))
            else:
                self.tally.drop(reason or "no answer is in the loss", document.where)
        texts = [entry for _, made in ready for entry in made if isinstance(entry, Piece)]
        encoded = iter(self._tokenized(texts) if texts else ())
        for document, made in ready:
            pairs = [next(encoded) if isinstance(entry, Piece) else (list(entry.input_ids), list(entry.labels)) for entry in made]
            try:
                framed = [self._framed(document, pair) for pair in pairs]
            except BadRow as error:
                self.tally.refuse(document.where, error)
                continue
            yield from self._fitted(framed, document.where)

    def _ready(self, document: Document) -> Sequence[Piece | Tokens]:
        """Return a document that is no conversation as pieces."""
        if isinstance(document, Tokens):
            return [document]
        if isinstance(document, Completion):
            text, start = document.prompt + document.completion, len(document.prompt)
        elif isinstance(document, Text):
            text, start = document.text, 0
        else:
            kind = "labelled texts" if isinstance(document, Labelled) else type(document).__name__
            raise DataError(
                f"{document.where}: {kind} are for classification", hint="set data.task, or name another format with data.format"
            )
        if self.tokenizer.control.pattern.search(text):  # such rows are the model's input as it is
            self.tally.note("some rows contain strings of control tokens, which become control tokens")
        return [Piece(text, ((0 if self.learn == "all" else start, len(text)),))]

    def _tokenized(self, pieces: list[Piece]) -> list[tuple[list[int], list[int]] | BadRow]:
        """Return ids and labels of all pieces; of a very long one, tokenize only what fits into `max_length`."""
        short = [self._shortened(piece) for piece in pieces]
        found = self.tokenizer.encode(short)
        for index, (piece, cut, result) in enumerate(zip(pieces, short, found, strict=True)):
            if cut is not piece and not isinstance(result, BadRow) and len(result[0]) <= self.tally.max_length:
                found[index] = self.tokenizer.encode([piece])[0]
        return found

    def _shortened(self, piece: Piece) -> Piece:
        """Cut off what is surely beyond `max_length`: no token has more characters than the vocabulary's longest."""
        limit = (self.tally.max_length + 64) * self.tokenizer.longest
        if self.overflow == "split" or len(piece.text) <= limit:
            return piece
        in_loss = tuple((start, min(end, limit)) for start, end in piece.in_loss if start < limit)
        literal = tuple((start, end) for start, end in piece.literal if end <= limit)
        return Piece(piece.text[:limit], in_loss, literal)

    def _framed(self, document: Document, found: tuple[list[int], list[int]] | BadRow) -> tuple[list[int], list[int]]:
        """Add the tokenizer's special tokens and the end token to a text, each once; check all ids."""
        if isinstance(found, BadRow):
            raise found
        ids, labels = found
        if isinstance(document, (Text, Completion)):
            own = self.tokenizer
            if own.prefix and ids[: len(own.prefix)] != own.prefix:
                ids, labels = own.prefix + ids, [IGNORED] * len(own.prefix) + labels
            end = own.suffix or ([own.eos] if own.eos is not None else [])
            if end and ids[-len(end) :] != end:
                ids, labels = ids + end, labels + end
        self._check_ids(ids, "token")
        if isinstance(document, Tokens):
            self._check_ids([label for label in labels if label != IGNORED], "label")
        return ids, labels

    def _check_ids(self, ids: list[int], name: str) -> None:
        """Raise BadRow for the first id outside the model's vocabulary."""
        size = self.vocabulary_size
        if ids and (min(ids) < 0 or (size is not None and max(ids) >= size)):
            wrong = next(value for value in ids if value < 0 or (size is not None and value >= size))
            raise BadRow(
                f"has the {name} id {wrong}; the vocabulary has {size} ids, 0 to {size - 1}" if size else f"has the {name} id {wrong}"
            )

    def _fitted(self, framed: list[tuple[list[int], list[int]]], where: str) -> Iterator[Example]:
        """Yield a row's examples, cut, split or dropped as `overflow` says; one without a label is never kept."""
        tally, limit = self.tally, self.tally.max_length
        longest = max(len(ids) for ids, _ in framed)
        tally.longest = max(tally.longest, longest)
        kept = 0
        for ids, labels in framed:
            if len(ids) > limit and self.overflow == "drop":
                continue
            step = limit if self.overflow == "split" else max(len(ids), 1)
            for start in range(0, len(ids), step):
                part, marks = ids[start : start + limit], labels[start : start + limit]
                marks[0] = IGNORED  # no token comes before the first one to predict it from
                in_loss = len(marks) - marks.count(IGNORED)
                if not in_loss:
                    continue
                kept += 1
                tally.examples += 1
                tally.tokens += len(part)
                tally.in_loss += in_loss
                tally.truncated += self.overflow == "truncate" and len(ids) > limit
                tally.keys[hash((tuple(part), tuple(marks)))] += 1
                yield Example(part, marks, where)
        tally.used += bool(kept)
        if kept:
            return
        if longest <= limit:
            tally.drop("no tokens in the loss", where)
            return
        tally.too_long = True
        cut = {"drop": f"longer than max_length {limit}", "truncate": f"truncating to max_length {limit} left no tokens in the loss"}
        tally.drop(cut.get(self.overflow, f"no tokens in the loss in any window of max_length {limit}"), where)
