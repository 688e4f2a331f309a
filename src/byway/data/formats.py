"""``rows -> documents``: a table of formats, each a small class; the format is decided over all rows, or named.

To add one: write a class with ``name``, ``keys``, ``matches`` and ``convert`` and list it in :data:`FORMATS`, before those it is a special
case of.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from byway.data.bad_rows import BadRow, BadRows, snippet
from byway.data.documents import Completion, Conversation, Document, Labelled, Message, Text, Tokens
from byway.data.messages import as_json, as_messages, as_sharegpt, as_text, as_tools
from byway.data.rows import Row, Rows
from byway.errors import ConfigError, DataError, listed, nearest

__all__ = ["FORMATS", "Documents", "Format", "detect", "named", "to_documents"]

Fields = Mapping[str, Any]


class Format(ABC):
    """One way to write a row. ``keys``: all keys it reads."""

    name: ClassVar[str]
    keys: ClassVar[tuple[str, ...]]

    @abstractmethod
    def matches(self, fields: Fields) -> bool:
        """Whether a row has the keys of this format (their values are checked in :meth:`convert`)."""

    @abstractmethod
    def convert(self, row: Row, columns: Mapping[str, str]) -> Document:
        """The row as a document; `columns` maps this format's keys to the row's own. Raises BadRow."""


def _renamed(fields: Fields, columns: Mapping[str, str]) -> Fields:
    """The row under the format's names: ``columns = {"prompt": "question"}`` reads `prompt` from `question`."""
    if not columns:
        return fields
    taken = set(columns.values())
    kept = {key: value for key, value in fields.items() if key not in taken and key not in columns}
    return kept | {ours: fields[theirs] for ours, theirs in columns.items() if theirs in fields}


def _has(fields: Fields, *keys: str) -> bool:
    return all(fields.get(key) is not None for key in keys)


class TokensFormat(Format):
    """``{"input_ids": [...], "labels": [...]?, "attention_mask": [...]?}``: without labels every token is learned."""

    name = "tokens"
    keys = ("input_ids", "labels", "attention_mask", "position_ids", "token_type_ids")

    def matches(self, fields: Fields) -> bool:
        """Has `input_ids`."""
        return _has(fields, "input_ids")

    def convert(self, row: Row, columns: Mapping[str, str]) -> Document:
        """Positions whose attention mask is 0 are padding and are left out."""
        fields = _renamed(row.fields, columns)
        ids = _integers(fields, "input_ids")
        labels = _integers(fields, "labels") if _has(fields, "labels") else ids
        mask = _integers(fields, "attention_mask") if _has(fields, "attention_mask") else (1,) * len(ids)
        for key, values in (("labels", labels), ("attention_mask", mask)):
            if len(values) != len(ids):
                raise BadRow(f"has {len(values)} {key} for {len(ids)} input_ids")
        kept = [index for index, seen in enumerate(mask) if seen]
        return Tokens(where=row.where, input_ids=tuple(ids[i] for i in kept), labels=tuple(labels[i] for i in kept))


def _integers(fields: Fields, key: str) -> tuple[int, ...]:
    values = as_json(fields[key], key)
    if not isinstance(values, (list, tuple)) or any(type(value) is not int for value in values):
        raise BadRow(f"{key} is not a list of integers")
    return tuple(values)


class MessagesFormat(Format):
    """``{"messages": [{"role", "content"}], "tools"?, "chat_template_kwargs"?}``."""

    name = "messages"
    keys = ("messages", "tools", "chat_template_kwargs")

    def matches(self, fields: Fields) -> bool:
        """Has `messages`."""
        return _has(fields, "messages")

    def convert(self, row: Row, columns: Mapping[str, str]) -> Document:
        """Roles checked, parts joined, tool calls parsed."""
        fields = _renamed(row.fields, columns)
        messages, unlearned = as_messages(fields["messages"], "messages")
        return Conversation(
            where=row.where,
            messages=messages,
            tools=as_tools(fields.get("tools")),
            unlearned=unlearned,
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

    def matches(self, fields: Fields) -> bool:
        """Has `conversations`."""
        return _has(fields, "conversations")

    def convert(self, row: Row, columns: Mapping[str, str]) -> Document:
        """human → user, gpt → assistant, observation → tool, function_call → a tool call of the assistant."""
        fields = _renamed(row.fields, columns)
        messages, unlearned = as_sharegpt(fields["conversations"])
        return Conversation(
            where=row.where,
            messages=(*_system(fields), *messages),
            tools=as_tools(fields.get("tools")),
            unlearned=_shift(unlearned, fields),
        )


def _system(fields: Fields) -> tuple[Message, ...]:
    """The row's `system` as a message, when it has one."""
    value = fields.get("system")
    if value is None or value == "":
        return ()
    return ({"role": "system", "content": as_text(value, "system")},)


def _shift(indices: frozenset[int], fields: Fields) -> frozenset[int]:
    return frozenset(index + len(_system(fields)) for index in indices)


class CompletionFormat(Format):
    """``{"prompt": ..., "completion": ...}``: both text, or both lists of messages."""

    name = "prompt_completion"
    keys = ("prompt", "completion", "tools", "chat_template_kwargs")

    def matches(self, fields: Fields) -> bool:
        """Has `prompt` and `completion`."""
        return _has(fields, "prompt", "completion")

    def convert(self, row: Row, columns: Mapping[str, str]) -> Document:
        """Two texts, or a conversation of which only the completion's messages are learned."""
        fields = _renamed(row.fields, columns)
        prompt, completion = fields["prompt"], fields["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return Completion(where=row.where, prompt=prompt, completion=completion)
        if not isinstance(prompt, (list, tuple)) or not isinstance(completion, (list, tuple)):
            raise BadRow("prompt and completion are neither both text nor both lists of messages")
        before, _ = as_messages(prompt, "prompt")
        after, unlearned = as_messages(completion, "completion")
        return Conversation(
            where=row.where,
            messages=(*before, *after),
            tools=as_tools(fields.get("tools")),
            unlearned=frozenset(index + len(before) for index in unlearned),
            first_learned=len(before),
            template_kwargs=_template_kwargs(fields),
        )


class AlpacaFormat(Format):
    """``{"instruction", "input"?, "output", "system"?, "history"?: [[question, answer], ...]}``."""

    name = "alpaca"
    keys = ("instruction", "input", "output", "system", "history")

    def matches(self, fields: Fields) -> bool:
        """Has `instruction` and `output`."""
        return _has(fields, "instruction", "output")

    def convert(self, row: Row, columns: Mapping[str, str]) -> Document:
        """The user's turn is instruction and input with an empty line between; history comes before it."""
        fields = _renamed(row.fields, columns)
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
        return Conversation(where=row.where, messages=tuple(messages))


class ClassificationFormat(Format):
    """``{"text" | "sentence" | "sentence1" + "sentence2" | "premise" + "hypothesis", "label"}``."""

    name = "classification"
    keys = ("text", "sentence", "sentence1", "sentence2", "premise", "hypothesis", "label")
    texts: ClassVar[tuple[tuple[str, ...], ...]] = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("sentence",), ("text",))

    def matches(self, fields: Fields) -> bool:
        """Has `label` and one of the texts."""
        return _has(fields, "label") and any(_has(fields, *keys) for keys in self.texts)

    def convert(self, row: Row, columns: Mapping[str, str]) -> Document:
        """A label is an index (true and false are 1 and 0) or a name; whole floats are indices."""
        fields = _renamed(row.fields, columns)
        keys = next(keys for keys in self.texts if _has(fields, *keys))
        label = fields["label"]
        if isinstance(label, float) and label.is_integer():
            label = int(label)
        if not isinstance(label, (int, str)):
            raise BadRow(f"label {snippet(repr(label))} is neither a whole number nor a name, so it is no class")
        return Labelled(
            where=row.where,
            texts=tuple(as_text(fields[key], key) for key in keys),
            label=label if isinstance(label, str) else int(label),
        )


class TextFormat(Format):
    """``{"text": "..."}``."""

    name = "text"
    keys = ("text",)

    def matches(self, fields: Fields) -> bool:
        """Has `text`."""
        return _has(fields, "text")

    def convert(self, row: Row, columns: Mapping[str, str]) -> Document:
        """The text as it is."""
        return Text(where=row.where, text=as_text(_renamed(row.fields, columns)["text"], "text"))


FORMATS: tuple[Format, ...] = (
    TokensFormat(),
    MessagesFormat(),
    ShareGPTFormat(),
    CompletionFormat(),
    AlpacaFormat(),
    ClassificationFormat(),
    TextFormat(),
)
"""In the order in which they are preferred when a row fits several."""


@dataclass(frozen=True)
class Documents:
    """The rows of one source as documents of one `format`. ``unused``: keys that no row's format reads. ``bad``: rows that were skipped."""

    items: list[Document]
    format: str
    source: str
    bad: BadRows
    unused: tuple[str, ...] = ()


def named(name: str) -> Format:
    """The format called `name`; :class:`ConfigError` with the nearest when there is none."""
    for entry in FORMATS:
        if entry.name == name:
            return entry
    names = [entry.name for entry in FORMATS]
    raise ConfigError(f"data format {name!r} does not exist", hint=nearest(name, names) or f"there are: auto, {listed(names)}")


def detect(
    rows: Iterable[Row], columns: Mapping[str, str] | None = None, among: Iterable[str] | None = None, skip_bad: bool = False
) -> Format:
    """The first format of :data:`FORMATS` (or of the names in `among`) whose keys *every* row has.

    Raises :class:`DataError` naming the first row that fits none (`skip_bad`: if all do), or the first two that fit no common one.
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
            raise DataError(f"{row.where} fits no format: its keys are {listed(fields)}", hint=_advice(fields, chosen))
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
    """The near miss among the keys, or what the formats want."""
    known = list(dict.fromkeys(key for entry in chosen for key in entry.keys))
    for key in fields:
        close = nearest(key, known)
        if close and key not in known and close.removeprefix("did you mean '")[0] == key[0]:
            return f"for the key {key!r}, {close}"
    formats = "; ".join(f"{entry.name}: {', '.join(entry.keys[:3])}" for entry in chosen)
    return f"map its keys with data.columns, as in {{prompt: <key>, completion: <key>}}. Formats: {formats}"


def to_documents(
    rows: Rows,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    among: Iterable[str] | None = None,
    skip_bad: bool = False,
) -> Documents:
    """All rows as documents of one format (detected over all of them, or named).

    `columns`: the format's key → the row's key. `among`: the formats that detection may choose (a task knows which it can use). Raises
    :class:`DataError` with every row whose values do not fit, unless `skip_bad`; then they are counted beside those of `rows`.
    """
    columns = columns or {}
    _check_present(rows, columns)
    chosen = detect(rows, columns, among, skip_bad) if format == "auto" else named(format)
    _check_keys(chosen, columns)
    bad = BadRows(skip=skip_bad, count=rows.bad.count, first=list(rows.bad.first))
    items: list[Document] = []
    unused: dict[str, None] = {}
    for row in rows:
        fields = _renamed(row.fields, columns)
        unused.update(dict.fromkeys(key for key in fields if key not in chosen.keys))
        try:
            if not chosen.matches(fields):
                raise BadRow(f"is not {chosen.name}: its keys are {listed(fields)}")
            items.append(chosen.convert(row, columns))
        except BadRow as error:
            bad.add(row.where, str(error))
    bad.check()
    return Documents(items, chosen.name, rows.source, bad, tuple(unused))


MAPPING = "columns map the format's key to the row's, as in {prompt: question, completion: answer}"


def _check_present(rows: Rows, columns: Mapping[str, str]) -> None:
    """Each key that `columns` reads from must be in some row."""
    present = list(dict.fromkeys(key for row in rows for key in row.fields)) if columns else []
    missing = [theirs for theirs in columns.values() if theirs not in present]
    if missing:
        problems = [
            f"data.columns: no row has the key {key!r}; {nearest(key, present) or 'there are ' + listed(present)}" for key in missing
        ]
        raise ConfigError("\n".join(problems), hint=MAPPING)


def _check_keys(chosen: Format, columns: Mapping[str, str]) -> None:
    """Each entry of `columns` must be a key of the format."""
    unknown = [ours for ours in columns if ours not in chosen.keys]
    if unknown:
        has = listed(chosen.keys)
        problems = [f"data.columns: {key!r} is no key of {chosen.name}; {nearest(key, chosen.keys) or 'it has ' + has}" for key in unknown]
        raise ConfigError("\n".join(problems), hint=MAPPING)
