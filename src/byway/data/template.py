"""A conversation as the model's own chat template writes it, and which characters of it are learned.

What is learned of an assistant's turn is what the model has to write when it is served: with ``P = template(messages before it, generation
prompt)`` and ``A = template(messages up to it)``, ``A`` must begin with ``P``, and the rest of ``A``, up to its end-of-turn token and with
it, is learned. Nothing else is assumed about the template. Where it writes earlier turns differently once later ones follow (Qwen3 leaves
their thinking out), a turn is learned in the text it would be served in, so that one row becomes several examples. A template with
``{% generation %}`` markers says itself what is learned.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from byway.data.bad_rows import BadRow, snippet
from byway.data.documents import Conversation, Message
from byway.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ChatTemplate", "Learn", "Piece", "Span", "control_strings", "stop_tokens"]

Span = tuple[int, int]
"""Characters ``[start, end)``."""
Learn = Literal["responses", "last", "all"]

PROBE = "Kestrel47"
"""A word no template contains; where it comes out shows what the template writes around a message."""
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
FORBIDDEN = ("\ufdd0", "\ufdd1")
"""Two Unicode noncharacters (reserved for use inside a program), the brackets around control-token strings that stay text."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Text for the model. ``learned``: character spans that are learned; ``literal``: strings of control tokens that are text."""

    text: str
    learned: tuple[Span, ...] = ()
    literal: tuple[Span, ...] = ()


def control_strings(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches the strings that the tokenizer would turn into special tokens, longest first."""
    names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | set(tokenizer.all_special_tokens)
    ordered = sorted((name for name in names if name.strip()), key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


class ChatTemplate:
    """The template of a tokenizer, or another given as Jinja text or as the path of a ``.jinja`` file.

    Raises :class:`ConfigError` when there is none, or when its generation prompt is not how it begins an answer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        learn: Learn = "responses",
    ) -> None:
        self.tokenizer = tokenizer
        self.learn: Learn = learn
        self.variables = dict(variables or {})
        self.template = _template_text(template)
        if self.template is None and not tokenizer.chat_template:
            raise ConfigError(
                "the model has no chat template, so conversations cannot be written for it",
                hint="use an instruct model, give data.template a .jinja file, or turn the rows into text or prompt/completion",
            )
        chosen = self.template or tokenizer.get_chat_template()
        self.marked = bool(GENERATION.search(chosen))
        self.control = control_strings(tokenizer)
        self.features: dict[str, bool] = {}
        added = sorted({token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens), key=len)
        self.added = re.compile("|".join(re.escape(name) for name in reversed(added) if name.strip()) or r"(?!)")
        self.tail, self.end = self._ending()

    @property
    def ends_turns(self) -> bool:
        """Whether an answer is followed by a control token from which the model learns to stop."""
        return self.tail is None or bool(self.added.search(self.end))

    def pieces(self, conversation: Conversation) -> list[Piece]:
        """The conversation as text with learned spans: one piece, or several where the template rewrites earlier turns.

        Raises BadRow when the template refuses the row or would leave part of it out.
        """
        self._check_features(conversation)
        if self.learn == "all":
            text = self._write(conversation.messages, conversation)
            return [self._with_literals(Piece(text, ((0, len(text)),)), conversation, len(conversation.messages))]
        answers = [index for index in conversation.answers() if index > 0]
        if self.learn == "last":
            answers = [index for index in answers if index == len(conversation.messages) - 1]
        if not answers:
            return []
        if self.marked:
            return [self._marked_piece(conversation, answers)]
        return self._prefix_pieces(conversation, answers)

    # how the template writes

    def _write(self, messages: Sequence[Message], conversation: Conversation, prompt: bool = False) -> str:
        """What the template makes of `messages`, followed by the generation prompt when `prompt`."""
        try:
            written = self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(conversation.tools) if conversation.tools else None,
                chat_template=self.template,
                add_generation_prompt=prompt,
                tokenize=False,
                **(self.variables | conversation.template_kwargs),
            )
        except Exception as error:  # a template is foreign code and may raise anything
            raise BadRow(f"is refused by the chat template: {snippet(str(error), width=80)}") from error
        if not isinstance(written, str):
            raise BadRow("is not written as text by the chat template")
        return written

    def _ending(self) -> tuple[str | None, str]:
        """What the template writes after an answer, and the part of it that is learned: up to its first control tokens."""
        probe = Conversation(messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}))
        try:
            prompt, whole = self._write(probe.messages[:1], probe, prompt=True), self._write(probe.messages, probe)
        except BadRow:
            return None, ""
        if not self.marked and not whole.startswith(prompt):
            common = next((index for index, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole)))
            raise ConfigError(
                f"the chat template prompts for an answer with {prompt[common:][:40]!r}, but writes an answer that begins with "
                f"{whole[common:][:40]!r}: the model would be trained on another text than it is served",
                hint="give data.template a .jinja file with {% generation %} markers around what is learned",
            )
        if PROBE not in whole:
            raise ConfigError("the chat template leaves the assistant's text out", hint="give data.template another .jinja file")
        tail = whole[whole.rindex(PROBE) + len(PROBE) :]
        first = self.added.search(tail)
        if first is None:
            return tail, tail.rstrip()
        end = first.end()
        while (further := self.added.match(tail, end)) is not None:  # Command R7B closes the answer and then the turn
            end = further.end()
        return tail, tail[:end]

    def _check_features(self, conversation: Conversation) -> None:
        """Raise BadRow when the row has something that the template would silently leave out."""
        roles = {message["role"] for message in conversation.messages}
        needed = [("system", "system" in roles), ("tool", "tool" in roles), ("tools", bool(conversation.tools))]
        needed.append(("tool_calls", any(message.get("tool_calls") for message in conversation.messages)))
        for feature, used in needed:
            if not used:
                continue
            if feature not in self.features:
                self.features[feature] = self._writes(feature)
            if not self.features[feature]:
                raise BadRow(f"has {FEATURES[feature]}, which the model's chat template leaves out (data.template can name another)")

    def _writes(self, feature: str) -> bool:
        """Whether the template writes `feature`; one that refuses it is left to refuse the row itself, in its own words."""
        user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        schema = {"name": PROBE, "description": "c", "parameters": {"type": "object", "properties": {}}}
        call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": PROBE, "arguments": {}}}]}
        plain_call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "d", "arguments": {}}}]}
        probes: dict[str, Conversation] = {
            "system": Conversation(messages=({"role": "system", "content": PROBE}, user, answer)),
            "tool": Conversation(messages=(user, plain_call, {"role": "tool", "name": "d", "content": PROBE}, answer)),
            "tools": Conversation(messages=(user, answer), tools=({"type": "function", "function": schema},)),
            "tool_calls": Conversation(messages=(user, call, {"role": "tool", "name": PROBE + "x", "content": "d"}, answer)),
        }
        try:
            written = self._write(probes[feature].messages, probes[feature])
        except BadRow:
            return True
        return bool(re.search(PROBE + r"(?!x)", written))

    # what is learned

    def _prefix_pieces(self, conversation: Conversation, answers: list[int]) -> list[Piece]:
        """Each answer in the latest text that contains it exactly as it would be served."""
        spans: dict[int, Span] = {}
        written: dict[int, str] = {}
        for index in answers:
            prompt = self._write(conversation.messages[:index], conversation, prompt=True)
            written[index] = self._write(conversation.messages[: index + 1], conversation)
            if not written[index].startswith(prompt):
                raise BadRow(
                    f"messages[{index}] is not written as an answer to what comes before it: the template would be served another prompt"
                )
            spans[index] = (len(prompt), len(prompt) + self._learned_length(written[index][len(prompt) :]))
        pieces: list[Piece] = []
        left = answers
        while left:
            text = written[left[-1]]
            covered = [index for index in left if text.startswith(written[index][: spans[index][1]])]
            pieces.append(self._with_literals(Piece(text, tuple(spans[index] for index in covered)), conversation, left[-1] + 1))
            left = [index for index in left if index not in covered]
        return pieces[::-1]

    def _learned_length(self, reply: str) -> int:
        """How many characters of a reply are learned: to the end of its end-of-turn token, without what the template puts after it."""
        if self.tail and reply.endswith(self.tail):
            return len(reply) - len(self.tail) + len(self.end)
        return len(reply.rstrip())

    def _marked_piece(self, conversation: Conversation, answers: list[int]) -> Piece:
        """The whole conversation, learned where the template's markers say; the end-of-turn token is added where they stop before it."""
        text, marks = self._write_marks(conversation.messages, conversation)
        every = [index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if answers != every:
            counts = [len(self._write_marks(conversation.messages[:index], conversation)[1]) if index else 0 for index in every]
            ends = [*counts[1:], len(marks)]
            marks = [mark for index, start, end in zip(every, counts, ends, strict=True) if index in answers for mark in marks[start:end]]
        spans: list[Span] = []
        for start, end in marks:
            if self.end and not text[start:end].rstrip().endswith(self.end.strip()) and text.startswith(self.end, end):
                end += len(self.end)
            end = start + len(text[start:end].rstrip())
            if end > start:
                spans.append((start, end))
        return self._with_literals(Piece(text, tuple(spans)), conversation, len(conversation.messages))

    def _write_marks(self, messages: Sequence[Message], conversation: Conversation) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        tools: list[Any] | None = list(conversation.tools) if conversation.tools else None
        variables: dict[str, Any] = {**self.tokenizer.special_tokens_map, **self.variables, **conversation.template_kwargs}
        try:
            texts, marks = render_jinja_template(
                conversations=[list(messages)],
                tools=tools,
                chat_template=self.tokenizer.get_chat_template(self.template, tools),
                return_assistant_tokens_mask=True,
                **variables,
            )
        except Exception as error:  # a template is foreign code and may raise anything
            raise BadRow(f"is refused by the chat template: {snippet(str(error), width=80)}") from error
        return texts[0], [(int(start), int(end)) for start, end in marks[0]]

    # control-token strings in the row's own text

    def _with_literals(self, piece: Piece, conversation: Conversation, count: int) -> Piece:
        """Find where the row's own control-token strings came out, by writing the row a second time with brackets around them."""
        messages = conversation.messages[:count]
        own = list(_strings([*messages, conversation.tools, conversation.template_kwargs]))
        found = next((hit for text in own if (hit := self.control.search(text))), None)
        if found is None:
            return piece
        opening, closing = FORBIDDEN
        if any(mark in text for mark in FORBIDDEN for text in own):
            raise BadRow(f"holds {found.group()} beside the noncharacters U+FDD0 or U+FDD1")
        bracketed = Conversation(
            messages=tuple(_bracket(message, self.control) for message in messages),
            tools=tuple(_bracket(tool, self.control) for tool in conversation.tools) if conversation.tools else None,
            template_kwargs=_bracket(conversation.template_kwargs, self.control),
        )
        written = self._write(bracketed.messages, bracketed)
        parts = re.split(f"({opening}[^{opening}{closing}]*{closing})", written)
        text, spans = "", []
        for part in parts:
            inner = part.strip(opening + closing) if part.startswith(opening) else part
            if part.startswith(opening):
                spans.append((len(text), len(text) + len(inner)))
            text += inner
        if text != piece.text:
            raise BadRow(f"holds {found.group()} where the chat template rewrites the text, so it cannot be told from a control token")
        return Piece(piece.text, piece.learned, tuple(spans))


FEATURES = {"system": "a system message", "tool": "a tool's answer", "tools": "tools", "tool_calls": "tool calls"}


def _strings(value: Any) -> Iterator[str]:
    """Every string inside lists and dicts, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _strings(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _strings(entry)


def _bracket(value: Any, control: re.Pattern[str]) -> Any:
    """The same structure with brackets around every control-token string."""
    if isinstance(value, str):
        return control.sub(lambda found: FORBIDDEN[0] + found.group() + FORBIDDEN[1], value)
    if isinstance(value, Mapping):
        return {key: _bracket(entry, control) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_bracket(entry, control) for entry in value]
    return value


def _template_text(template: str | None) -> str | None:
    """The Jinja text of a ``.jinja`` file, the text itself, or None for the tokenizer's own."""
    if template is None or "{" in template:
        return template
    path = Path(template)
    if not path.is_file():
        raise ConfigError(f"data.template {template!r} is neither a file nor Jinja text", hint="give the path of a .jinja file")
    return path.read_text(encoding="utf-8")


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Where an answer ends: the model's and the tokenizer's end tokens, and what the chat template writes after an answer."""
    own: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    found: list[Any] = [own] if isinstance(own, int) else list(own or ())
    if tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        probe = "Kestrel47"
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": probe}]
        try:
            text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        except Exception:  # a template is foreign code; one that refuses this conversation tells nothing about its end
            text = ""
        after = tokenizer(text.rpartition(probe)[2], add_special_tokens=False).input_ids
        special = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
        found += [token for token in after[:1] if token in special]
    return sorted({int(token) for token in found})
