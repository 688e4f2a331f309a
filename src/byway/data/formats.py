"""``rows -> documents``: a table of row formats. The format is named, or detected from all rows.

To add one: write a class with ``name``, ``keys``, ``needs`` and ``convert``, and list it in :data:`FORMATS` before the
formats it is a special case of.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from byway.data.bad_rows import BadRow, BadRows, snippet
from byway.data.documents import Completion, Conversation, Document, Labelled, Message, Text, Tokens
from byway.data.messages import as_json, as_messages, as_sharegpt, as_text, as_tools
from byway.data.rows import Row, Source, read_rows
from byway.errors import ConfigError, DataError, listed, nearest

__all__ = ["FORMATS", "Documents", "Format", "detect", "named", "read_documents"]

Fields = Mapping[str, Any]


class Format(ABC):
    """One way to write a row."""

    name: ClassVar[str]
    keys: ClassVar[tuple[str, ...]]
    """All keys it reads."""
    needs: ClassVar[tuple[tuple[str, ...], ...]]
    """A row has this format if it has all keys of one of these tuples."""

    def matches(self, fields: Fields) -> bool:
        """True if a row has the keys of this format; :meth:`convert` checks their values."""
        return any(_has(fields, *keys) for keys in self.needs)

    @abstractmethod
    def convert(self, fields: Fields, where: str) -> Document:
        """Return the row as a document. Raises BadRow."""


def _renamed(fields: Fields, columns: Mapping[str, str]) -> Fields:
    """Return the row under the format's keys: ``columns = {"prompt": "question"}`` reads `prompt` from `question`."""
    if not columns:
        return fields
    taken = set(columns.values())
    kept = {key: value for key, value in fields.items() if key not in taken and key not in columns}
    return kept | {ours: fields[theirs] for ours, theirs in columns.items() if theirs in fields}


def _has(fields: Fields, *keys: str) -> bool:
    return all(fields.get(key) is not None for key in keys)


class TokensFormat(Format):
    """``{"input_ids": [...], "labels"?: [...], "attention_mask"?: [...]}``; default: every token is in the loss."""

    name = "tokens"
    keys = ("input_ids", "labels", "attention_mask", "position_ids", "token_type_ids")
    needs = (("input_ids",),)

    def convert(self, fields: Fields, where: str) -> Document:
        """Leave out padding: positions whose attention mask is 0."""
        ids = _integers(fields, "input_ids")
        labels = _integers(fields, "labels") if _has(fields, "labels") else ids
        mask = _integers(fields, "attention_mask") if _has(fields, "attention_mask") else (1,) * len(ids)
        for key, values in (("labels", labels), ("attention_mask", mask)):
            if len(values) != len(ids):
                raise BadRow(f"has {len(values)} {key} for {len(ids)} input_ids")
        kept = [index for index, seen in enumerate(mask) if seen]
        return Tokens(where=where, input_ids=tuple(ids[i] for i in kept), labels=tuple(labels[i] for i in kept))


def _integers(fields: Fields, key: str) -> tuple[int, ...]:
    values = as_json(fields[key], key)
    if not isinstance(values, (list, tuple)) or any(type(value) is not int for value in values):
        raise BadRow(f"{key} is not a list of integers")
    return tuple(values)


class MessagesFormat(Format):
    """``{"messages": [{"role", "content"}], "tools"?, "chat_template_kwargs"?}``."""

    name = "messages"
    keys = ("messages", "tools", "chat_template_kwargs")
    needs = (("messages",),)

    def convert(self, fields: Fields, where: str) -> Document:
        """Check roles, join parts, parse tool calls."""
        messages, unweighted = as_messages(fields["messages"], "messages")
        return Conversation(
            where=where,
            messages=messages,
            tools=as_tools(fields.get("tools")),
            unweighted=unweighted,
            template_kwargs=_template_kwargs(fields),
        )


def _template_kwargs(fields: Fields) -> dict[str, Any]:
    value = as_json(fields.get("chat_template_kwargs") or {}, "chat_template_kwargs")
    if not isinstance(value, dict):
        raise BadRow("chat_template_kwargs is not an object")
    return value


class ShareGPTFormat(Format):
    """``{"conversations": [{"from": "human", "value": "..."}], "system"?, "tools"?}``."""

    name = "sharegpt"
    keys = ("conversations", "system", "tools")
    needs = (("conversations",),)

    def convert(self, fields: Fields, where: str) -> Document:
        """Convert human → user, gpt → assistant, observation → tool, function_call → a tool call of the assistant."""
        before = _system(fields)
        messages, unweighted = as_sharegpt(fields["conversations"])
        return Conversation(
            where=where,
            messages=(*before, *messages),
            tools=as_tools(fields.get("tools")),
            unweighted=frozenset(index + len(before) for index in unweighted),
        )


def _system(fields: Fields) -> tuple[Message, ...]:
    """Return the row's `system` as a message, if it has one."""
    value = fields.get("system")
    if value is None or value == "":
        return ()
    return ({"role": "system", "content": as_text(value, "system")},)


class CompletionFormat(Format):
    """``{"prompt": ..., "completion": ...}``: both text, or both lists of messages."""

    name = "prompt_completion"
    keys = ("prompt", "completion", "tools", "chat_template_kwargs")
    needs = (("prompt", "completion"),)

    def convert(self, fields: Fields, where: str) -> Document:
        """Return two texts, or a conversation of which only the completion's messages are in the loss."""
        prompt, completion = fields["prompt"], fields["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return Completion(where=where, prompt=prompt, completion=completion)
        for key in ("prompt", "completion"):
            if not isinstance(fields[key], (list, tuple)):
                as_text(fields[key], key)
        if isinstance(prompt, str) or isinstance(completion, str):
            raise BadRow("prompt and completion are neither both text nor both lists of messages")
        before, _ = as_messages(prompt, "prompt")
        after, unweighted = as_messages(completion, "completion")
        return Conversation(
            where=where,
            messages=(*before, *after),
            tools=as_tools(fields.get("tools")),
            unweighted=frozenset(index + len(before) for index in unweighted),
            context=len(before),
            template_kwargs=_template_kwargs(fields),
        )


class AlpacaFormat(Format):
    """``{"instruction", "input"?, "output", "system"?, "history"?: [[question, answer], ...]}``."""

    name = "alpaca"
    keys = ("instruction", "input", "output", "system", "history")
    needs = (("instruction", "output"),)

    def convert(self, fields: Fields, where: str) -> Document:
        """Write instruction and input, with an empty line between them, as the user's turn; history comes before it."""
        question = as_text(fields["instruction"], "instruction")
        extra = fields.get("input")
        if extra is not None and extra != "":
            question = "\n\n".join(part for part in (question, as_text(extra, "input")) if part)
        messages: list[Message] = list(_system(fields))
        for pair in as_json(fields.get("history") or [], "history"):
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise BadRow("history is not a list of [question, answer] pairs")
            messages.append({"role": "user", "content": as_text(pair[0], "history")})
            messages.append({"role": "assistant", "content": as_text(pair[1], "history")})
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": as_text(fields["output"], "output")})
        return Conversation(where=where, messages=tuple(messages))


class ClassificationFormat(Format):
    """``{"text" | "sentence" | "sentence1" + "sentence2" | "premise" + "hypothesis", "label"}``."""

    name = "classification"
    keys = ("text", "sentence", "sentence1", "sentence2", "premise", "hypothesis", "label")
    needs = (("sentence1", "sentence2", "label"), ("premise", "hypothesis", "label"), ("sentence", "label"), ("text", "label"))

    def convert(self, fields: Fields, where: str) -> Document:
        """Take a label as an index (true and false are 1 and 0; a float without a fraction is one too) or as a name.

        White space around a name does not count.
        """
        *keys, _ = next(keys for keys in self.needs if _has(fields, *keys))
        label = fields["label"]
        if isinstance(label, float) and label.is_integer():
            label = int(label)
        if not isinstance(label, (int, str)):
            raise BadRow(f"label {snippet(repr(label))} is neither an integer nor a name")
        label = label.strip() if isinstance(label, str) else int(label)
        if label == "":
            raise BadRow("has no label: it is empty")
        return Labelled(where=where, texts=tuple(as_text(fields[key], key) for key in keys), label=label)


class TextFormat(Format):
    """``{"text": "..."}``."""

    name = "text"
    keys = ("text",)
    needs = (("text",),)

    def convert(self, fields: Fields, where: str) -> Document:
        """Return the text as it is."""
        return Text(where=where, text=as_text(fields["text"], "text"))


_ALL = (TokensFormat, MessagesFormat, ShareGPTFormat, CompletionFormat, AlpacaFormat, ClassificationFormat, TextFormat)
FORMATS: tuple[Format, ...] = tuple(kind() for kind in _ALL)
"""In order of preference, for rows that fit several."""


@dataclass(frozen=True)
class Documents:
    """The rows of one source as documents of one `format`. ``bad``: rows that were skipped."""

    items: list[Document]
    format: str = "documents"
    source: str = "rows"
    bad: BadRows = field(default_factory=BadRows)


def named(name: str) -> Format:
    """Return the format called `name`; :class:`ConfigError` with the nearest name if there is none."""
    known = {entry.name: entry for entry in FORMATS}
    if name not in known:
        raise ConfigError(f"data.format {name!r} does not exist", hint=nearest(name, known) or f"the formats are: auto, {listed(known)}")
    return known[name]


def detect(
    rows: Iterable[Row], columns: Mapping[str, str] | None = None, among: Iterable[str] | None = None, skip_bad: bool = False
) -> Format:
    """Return the first format of :data:`FORMATS` (of those named in `among`) whose keys *every* row has.

    Raises :class:`DataError` naming the first row that fits none (with `skip_bad`: if all do), or the first two that
    fit no common one.
    """
    names = None if among is None else set(among)
    chosen = [entry for entry in FORMATS if names is None or entry.name in names]
    common: list[Format] = chosen
    first: Row | None = None
    for row in rows:
        fields = _renamed(row.fields, columns or {})
        fitting = [entry for entry in chosen if entry.matches(fields)]
        if not fitting and skip_bad:
            continue
        if not fitting:
            null = [key for key in fields if fields[key] is None]
            has = f"its keys are {listed(fields.keys() - null)}" + (f", and null for {listed(null)}" if null else "")
            raise DataError(f"{row.where} fits no format: {has}", hint=_advice(fields, chosen))
        left = [entry for entry in common if entry in fitting]
        if first is not None and not left:
            raise DataError(
                f"rows of different formats: {first.where} is {common[0].name} ({listed(first.fields)}), "
                f"{row.where} is {fitting[0].name} ({listed(fields)})",
                hint="split the file, or name one format with data.format",
            )
        common, first = left, first or row
    if first is None:
        raise DataError("0 usable rows: none fits a format", hint="see the keys of the rows, and data.columns")
    return common[0]


def _advice(fields: Fields, chosen: Iterable[Format]) -> str:
    """Return the key that the row lacks, or the probable misspelling among its keys, or the keys of the formats."""
    known = list(dict.fromkeys(key for entry in chosen for key in entry.keys))
    for key in fields:
        close = nearest(key, known)
        if close and key not in known and close.removeprefix("did you mean '")[0] == key[0]:
            return f"for the key {key!r}, {close}"
    for entry in chosen:
        for keys in entry.needs:
            lacks = [key for key in keys if not _has(fields, key)]
            if len(lacks) == 1 and len(keys) > 1:
                return f"for {entry.name} it lacks a value for {lacks[0]!r}; data.columns can name another key, as in {{{lacks[0]}: <key>}}"
    formats = "; ".join(f"{entry.name}: {', '.join(entry.keys[:3])}" for entry in chosen)
    return f"map its keys with data.columns, as in {{prompt: <key>, completion: <key>}}. Formats: {formats}"


_MAPPING = "columns map the format's key to the row's, as in {prompt: question, completion: answer}"


def read_documents(
    source: Source,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    among: Iterable[str] | None = None,
    skip_bad: bool = False,
    limit: int | None = None,
) -> Documents:
    """Read the rows of `source`, and convert them to documents of one format.

    Args:
        source: see :func:`byway.data.rows.read_rows`.
        format: its name; ``auto``: detected from all rows.
        columns: the format's key → the row's key.
        among: the formats that detection chooses from; default: all.
        skip_bad: count rows that cannot be read or do not fit, instead of raising.
        limit: read only the first rows.

    Raises:
        ConfigError: `columns` names a key that no row or not the format has; there is no such format.
        DataError: bad rows, whose values do not fit (the first five are named); no usable row; rows that fit no format.
    """
    rows = read_rows(source, skip_bad=skip_bad, limit=limit)
    columns = columns or {}
    present = list(dict.fromkeys(key for row in rows for key in row.fields)) if columns else []
    if missing := [theirs for theirs in columns.values() if theirs not in present]:
        problems = [f"no row has the key {key!r}; {nearest(key, present) or 'there are ' + listed(present)}" for key in missing]
        raise ConfigError("\n".join(f"data.columns: {problem}" for problem in problems), hint=_MAPPING)
    chosen = detect(rows, columns, among, skip_bad) if format == "auto" else named(format)
    if unknown := [ours for ours in columns if ours not in chosen.keys]:
        has = listed(chosen.keys)
        problems = [f"{key!r} is not a key of {chosen.name}; {nearest(key, chosen.keys) or 'it has ' + has}" for key in unknown]
        raise ConfigError("\n".join(f"data.columns: {problem}" for problem in problems), hint=_MAPPING)
    items: list[Document] = []
    for row in rows:
        fields = _renamed(row.fields, columns)
        try:
            if not chosen.matches(fields):
                raise BadRow(f"is not {chosen.name}: its keys are {listed(fields)}")
            items.append(chosen.convert(fields, row.where))
        except BadRow as error:
            rows.bad.add(row.where, str(error))
    rows.bad.check()
    return Documents(items, chosen.name, rows.source, rows.bad)
