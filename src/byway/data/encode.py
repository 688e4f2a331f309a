"""``documents -> examples``: token ids and labels as the model will see them, and a report of what was cut, dropped and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, get_args

from byway.data.bad_rows import BadRow, BadRows
from byway.data.documents import Completion, Conversation, Document, Labelled, Text, Tokens
from byway.data.formats import Documents
from byway.data.report import DataReport, Tally
from byway.data.template import ChatTemplate, Learn, Piece
from byway.data.tokens import IGNORED, Tokenizer
from byway.errors import ConfigError, DataError, listed, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoded", "Example", "Overflow", "encode", "shared"]

Overflow = Literal["truncate", "drop", "split"]
CHUNK = 256
"""Documents tokenized in one call of the tokenizer."""


@dataclass(frozen=True, slots=True)
class Example:
    """What one forward pass sees of a row. ``labels``: -100 where nothing is learned, unshifted (label i is the token at i)."""

    input_ids: list[int]
    labels: list[int]
    where: str


@dataclass(frozen=True)
class Encoded:
    """Examples in the order of the rows, and what became of the rows. ``keys``: hashes of the contents, for :func:`shared`."""

    examples: list[Example]
    report: DataReport
    keys: frozenset[int] = field(default_factory=frozenset, repr=False)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(example.input_ids) for example in self.examples]


@dataclass(frozen=True)
class _Ready:
    """A piece to tokenize: with the tokenizer's own special tokens and an end token around it (``framed``), or as it is."""

    piece: Piece
    framed: bool


def encode(
    documents: Documents | Iterable[Document],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int,
    learn: Learn = "responses",
    overflow: Overflow = "truncate",
    template: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    control_in_text: bool = True,
    vocabulary_size: int | None = None,
    skip_bad: bool = False,
) -> Encoded:
    """Turn documents into examples.

    `learn`: the assistant's turns with their end-of-turn token ("responses"), the last message alone ("last") or every token ("all"). A
    text is learned whole, of a prompt/completion pair the completion and the end token. `overflow`: what becomes of an example longer than
    `max_length` tokens: cut at the end, left out, or split into windows of that length. `template`: Jinja text or a ``.jinja`` file in
    place of the tokenizer's chat template; `template_kwargs`: variables for it. `control_in_text`: whether control-token strings in `text`
    and `prompt`/`completion` rows are control tokens (those rows are the model's input as it is); in conversations they are always text.
    `vocabulary_size`: the model's, by default the tokenizer's. Raises :class:`ConfigError` for options that cannot be used and
    :class:`DataError` for bad rows (all of them at once; `skip_bad` counts them) and when no row is usable.
    """
    _check_options(learn, overflow, max_length)
    source, name = (documents.source, documents.format) if isinstance(documents, Documents) else ("rows", "documents")
    bad = BadRows(skip=skip_bad or (isinstance(documents, Documents) and documents.bad.skip))
    if isinstance(documents, Documents):
        bad.count, bad.first = documents.bad.count, list(documents.bad.first)
    tally = Tally(source, name, max_length, bad)
    state = _Encoder(tokenizer, tally, max_length, learn, overflow, template, template_kwargs, control_in_text, vocabulary_size)
    examples: list[Example] = []
    stream = iter(documents.items if isinstance(documents, Documents) else documents)
    while chunk := list(islice(stream, CHUNK)):
        examples += state.chunk(chunk)
    bad.check()
    return Encoded(examples, tally.report(), frozenset(tally.keys))


def shared(a: Encoded, b: Encoded) -> int:
    """How many distinct examples of `b` are also in `a`, token for token (a held-out set should share none with the training set)."""
    return len(a.keys & b.keys)


def _check_options(learn: str, overflow: str, max_length: int) -> None:
    for key, value, options in (("learn", learn, get_args(Learn)), ("overflow", overflow, get_args(Overflow))):
        if value not in options:
            raise ConfigError(f"data.{key} is {value!r}", hint=nearest(value, options) or f"it is one of {listed(options)}")
    if max_length < 2:
        raise ConfigError(f"data.max_length is {max_length}; at least 2 tokens are needed to predict one from another")


class _Encoder:
    """The state of one :func:`encode` call."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        tally: Tally,
        max_length: int,
        learn: Learn,
        overflow: Overflow,
        template: str | None,
        template_kwargs: Mapping[str, Any] | None,
        control_in_text: bool,
        vocabulary_size: int | None,
    ) -> None:
        self.own = tokenizer
        self.tally = tally
        self.max_length = max_length
        self.learn: Learn = learn
        self.overflow: Overflow = overflow
        self.template = template
        self.template_kwargs = template_kwargs
        self.control_in_text = control_in_text
        self.vocabulary_size = vocabulary_size if vocabulary_size is not None else len(tokenizer) if tokenizer is not None else None
        self._tokenizer: Tokenizer | None = None
        self._chat: ChatTemplate | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, examined once; rows of tokens alone need none."""
        if self._tokenizer is None:
            if self.own is None:
                raise ConfigError(
                    "the base has no tokenizer, so text cannot be encoded", hint="give rows of input_ids, or a base with a tokenizer"
                )
            self._tokenizer = Tokenizer(self.own)
        return self._tokenizer

    @property
    def chat(self) -> ChatTemplate:
        """The chat template, examined once."""
        if self._chat is None:
            self._chat = ChatTemplate(self.tokenizer.own, self.template, self.template_kwargs, self.learn)
            if not self._chat.ends_turns:
                self.tally.note("the chat template writes no end-of-turn token after an answer, so the model cannot learn to stop")
        return self._chat

    def chunk(self, documents: list[Document]) -> Iterator[Example]:
        """Examples of some documents, in their order; every row that gives none is counted."""
        ready: list[tuple[Document, list[_Ready | Tokens]]] = []
        for document in documents:
            self.tally.rows += 1
            reason = document.unusable()
            try:
                made = [] if reason else self._ready(document)
            except BadRow as error:
                self._bad(document.where, error)
                continue
            if made:
                ready.append((document, made))
            else:
                self.tally.drop(reason or "no answer is left to learn", document.where)
        texts = [entry for _, made in ready for entry in made if isinstance(entry, _Ready)]
        encoded = iter(self._encode([entry.piece for entry in texts]) if texts else ())
        for document, made in ready:
            pairs = [next(encoded) if isinstance(entry, _Ready) else (list(entry.input_ids), list(entry.labels)) for entry in made]
            try:
                framed = [self._framed(entry, pair) for entry, pair in zip(made, pairs, strict=True)]
            except BadRow as error:
                self._bad(document.where, error)
                continue
            yield from self._fitted(framed, document.where)

    def _bad(self, where: str, error: BadRow) -> None:
        self.tally.rows -= 1
        self.tally.bad.add(where, str(error))

    def _encode(self, pieces: list[Piece]) -> list[tuple[list[int], list[int]] | BadRow]:
        """Ids and labels of all pieces; of a very long one only as much as `max_length` can hold is tokenized."""
        short = [self._shortened(piece) for piece in pieces]
        found = self.tokenizer.encode(short)
        for index, (piece, cut, result) in enumerate(zip(pieces, short, found, strict=True)):
            if cut is not piece and not isinstance(result, BadRow) and len(result[0]) <= self.max_length:
                found[index] = self.tokenizer.encode([piece])[0]
        return found

    def _ready(self, document: Document) -> list[_Ready | Tokens]:
        if isinstance(document, Tokens):
            return [document]
        if isinstance(document, Conversation):
            pieces = self.chat.pieces(document)
            if len(pieces) > 1:
                self.tally.note(
                    "the chat template rewrites earlier turns, so some conversations became several examples, each as it is served"
                )
            return [_Ready(piece, framed=False) for piece in pieces]
        if isinstance(document, Completion):
            text, start = document.prompt + document.completion, len(document.prompt)
        elif isinstance(document, Text):
            text, start = document.text, 0
        else:
            kind = "labelled texts" if isinstance(document, Labelled) else type(document).__name__
            raise DataError(
                f"{document.where}: {kind} are for the classification task", hint="set data.task, or name the format with data.format"
            )
        literal = self.tokenizer.literals(text)
        if literal and self.control_in_text:
            self.tally.note(
                "some rows hold strings of control tokens, which are read as control tokens (control_in_text: false keeps them text)"
            )
            literal = ()
        return [_Ready(Piece(text, ((0 if self.learn == "all" else start, len(text)),), literal), framed=True)]

    def _shortened(self, piece: Piece) -> Piece:
        """Without what certainly lies behind `max_length`: a token has no more characters than the longest of the vocabulary."""
        limit = (self.max_length + 64) * self.tokenizer.longest
        if self.overflow == "split" or len(piece.text) <= limit:
            return piece
        learned = tuple((start, min(end, limit)) for start, end in piece.learned if start < limit)
        literal = tuple((start, end) for start, end in piece.literal if end <= limit)
        return Piece(piece.text[:limit], learned, literal)

    def _framed(self, entry: _Ready | Tokens, found: tuple[list[int], list[int]] | BadRow) -> tuple[list[int], list[int]]:
        """Put the tokenizer's special tokens and the end token around a text, each once; check that the model knows every id."""
        if isinstance(found, BadRow):
            raise found
        ids, labels = found
        if isinstance(entry, Tokens):
            self._check_ids(ids, "token", 0)
            self._check_ids([label for label in labels if label != IGNORED], "label", 0)
            return ids, labels
        if entry.framed:
            own = self.tokenizer
            if own.prefix and ids[: len(own.prefix)] != own.prefix:
                ids, labels = own.prefix + ids, [IGNORED] * len(own.prefix) + labels
            end = own.suffix or ([own.eos] if own.eos is not None else [])
            if end and ids[-len(end) :] != end:
                ids, labels = ids + end, labels + end
        self._check_ids(ids, "token", 0)
        return ids, labels

    def _check_ids(self, ids: list[int], name: str, lowest: int) -> None:
        """Raise BadRow for the first id outside the model's vocabulary."""
        size = self.vocabulary_size
        if not ids or (min(ids) >= lowest and (size is None or max(ids) < size)):
            return
        wrong = next(value for value in ids if value < lowest or (size is not None and value >= size))
        raise BadRow(f"has the {name} id {wrong}; the vocabulary has {size} ids, 0 to {size - 1}" if size else f"has the {name} id {wrong}")

    def _fitted(self, framed: list[tuple[list[int], list[int]]], where: str) -> Iterator[Example]:
        """A row's examples, cut, split or left out by `overflow`; one without a label is never kept."""
        tally, limit = self.tally, self.max_length
        longest = max(len(ids) for ids, _ in framed)
        tally.longest = max(tally.longest, longest)
        kept = 0
        for ids, labels in framed:
            if len(ids) > limit and self.overflow == "drop":
                continue
            step = limit if self.overflow == "split" else max(len(ids), 1)
            for start in range(0, len(ids), step):
                part, marks = ids[start : start + limit], labels[start : start + limit]
                marks[0] = IGNORED  # nothing comes before the first token that could predict it
                learned = len(marks) - marks.count(IGNORED)
                if not learned:
                    continue
                kept += 1
                tally.examples += 1
                tally.tokens += len(part)
                tally.learned += learned
                tally.truncated += self.overflow == "truncate" and len(ids) > limit
                tally.seen(hash((tuple(part), tuple(marks))))
                yield Example(part, marks, where)
        tally.used += bool(kept)
        if not kept and longest > limit:
            reason = f"longer than max_length {limit}" if self.overflow == "drop" else f"no learned token is left within max_length {limit}"
            tally.drop(reason, where)
        elif not kept:
            tally.drop("no token is learned", where)
