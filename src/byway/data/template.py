"""Write a conversation with the model's own chat template, and find the characters that are in the loss.

The loss covers what the model has to write when it is served. With ``P = template(messages before a turn, generation
prompt)`` and ``A = template(messages up to and including it)``, ``A`` must begin with ``P``; the rest of ``A``, up to
and including its end-of-turn token, is in the loss. Nothing else is assumed about the template. Some templates rewrite
earlier turns once later ones follow (Qwen3 drops their thinking): each turn is then trained in the text it would be
served in, so that one row becomes several examples. In a template with ``{% generation %}`` markers, the markers
decide.
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

__all__ = ["ChatTemplate", "Learn", "Piece", "Span", "bracketed", "control_strings", "special_ids", "stop_tokens", "strings", "unbracketed"]

Span = tuple[int, int]
"""Characters ``[start, end)``."""
Learn = Literal["responses", "last", "all"]

PROBE = "Kestrel47"
"""A word that no template contains; its place in the output shows what the template writes around a message."""
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
BRACKETS = ("\ufdd0", "\ufdd1")
"""Two Unicode noncharacters (reserved for use inside a program), put around strings to find them again."""
FEATURES = {"system": "a system message", "tool": "a tool's answer", "tools": "tools", "tool_calls": "tool calls"}


@dataclass(frozen=True, slots=True)
class Piece:
    """Text for the model. ``in_loss``: spans in the loss; ``literal``: strings of control tokens that stay text."""

    text: str
    in_loss: tuple[Span, ...] = ()
    literal: tuple[Span, ...] = ()


def control_strings(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern for the strings that the tokenizer would turn into special tokens, longest first."""
    names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | set(tokenizer.all_special_tokens)
    ordered = sorted((name for name in names if name.strip()), key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of the tokenizer's special tokens."""
    return {index for index, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)


class ChatTemplate:
    """The chat template of a tokenizer, or `template` in its place: Jinja text or the path of a ``.jinja`` file.

    Args:
        learn: ``responses``: the assistant's turns are in the loss; ``last``: the last message; ``all``: every token.

    Raises:
        ConfigError: there is no template, or answers do not begin with its generation prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None, learn: Learn = "responses") -> None:
        self.tokenizer = tokenizer
        self.learn: Learn = learn
        if template is not None and "{" not in template:
            if not Path(template).is_file():
                raise ConfigError(f"data.template {template!r} is neither a file nor Jinja text", hint="use the path of a .jinja file")
            template = Path(template).read_text(encoding="utf-8")
        self.template = template
        if self.template is None and not tokenizer.chat_template:
            raise ConfigError(
                "the model has no chat template, so conversations cannot be written for it",
                hint="use an instruct model, set data.template to a .jinja file, or convert the rows to text or prompt/completion",
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
        """True if the template ends an answer with a control token, from which the model learns to stop."""
        return self.tail is None or bool(self.added.search(self.end))

    def pieces(self, conversation: Conversation) -> list[Piece]:
        """Return the conversation as one piece of text, or several if the template rewrites earlier turns.

        Raises BadRow if the template refuses the row or would drop part of it.
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

    def _write(self, messages: Sequence[Message], conversation: Conversation, prompt: bool = False) -> str:
        """Return `messages` as the template writes them, followed by the generation prompt if `prompt`."""
        try:
            written = self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(conversation.tools) if conversation.tools else None,
                chat_template=self.template,
                add_generation_prompt=prompt,
                tokenize=False,
                **conversation.template_kwargs,
            )
        except Exception as error:  # a template is foreign code and may raise anything
            raise BadRow(f"is refused by the chat template: {snippet(str(error), width=80)}") from error
        if not isinstance(written, str):
            raise BadRow("is not turned into text by the chat template")
        return written

    def _ending(self) -> tuple[str | None, str]:
        """Return what the template writes after an answer, and its part in the loss, up to its first control tokens."""
        probe = Conversation(messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}))
        try:
            prompt, whole = self._write(probe.messages[:1], probe, prompt=True), self._write(probe.messages, probe)
        except BadRow:
            return None, ""
        if not self.marked and not whole.startswith(prompt):
            common = next((index for index, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole)))
            raise ConfigError(
                f"the generation prompt of the chat template ends with {prompt[common:][:40]!r}, but its answers begin with "
                f"{whole[common:][:40]!r}: the model would be served another text than it was trained on",
                hint="set data.template to a .jinja file with {% generation %} markers around the text to train on",
            )
        if PROBE not in whole:
            raise ConfigError("the chat template drops the assistant's text", hint="set data.template to another .jinja file")
        tail = whole[whole.rindex(PROBE) + len(PROBE) :]
        first = self.added.search(tail)
        if first is None:
            return tail, tail.rstrip()
        end = first.end()
        while (further := self.added.match(tail, end)) is not None:  # Command R7B ends the answer and then the turn
            end = further.end()
        return tail, tail[:end]

    def _check_features(self, conversation: Conversation) -> None:
        """Raise BadRow if the row has something that the template would silently drop."""
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
        roles = {message["role"] for message in conversation.messages}
        needed = [("system", "system" in roles), ("tool", "tool" in roles), ("tools", bool(conversation.tools))]
        needed.append(("tool_calls", any(message.get("tool_calls") for message in conversation.messages)))
        for feature, used in needed:
            if not used:
                continue
            if feature not in self.features:
                try:
                    written = self._write(probes[feature].messages, probes[feature])
                    self.features[feature] = re.search(PROBE + r"(?!x)", written) is not None
                except BadRow:  # the template refuses the row too, with its own message
                    self.features[feature] = True
            if not self.features[feature]:
                raise BadRow(f"has {FEATURES[feature]}, which the model's chat template drops (set data.template to another template)")

    def _prefix_pieces(self, conversation: Conversation, answers: list[int]) -> list[Piece]:
        """Return each answer in the latest text that contains it exactly as it would be served."""
        spans: dict[int, Span] = {}
        written: dict[int, str] = {}
        for index in answers:
            prompt = self._write(conversation.messages[:index], conversation, prompt=True)
            written[index] = self._write(conversation.messages[: index + 1], conversation)
            if not written[index].startswith(prompt):
                raise BadRow(f"messages[{index}]: the chat template does not write it as the continuation of its prompt")
            reply = written[index][len(prompt) :]
            # up to and including the end-of-turn token, without what the template puts after it
            tail = self.tail or ""
            end = len(reply) - len(tail) + len(self.end) if tail and reply.endswith(tail) else len(reply.rstrip())
            spans[index] = (len(prompt), len(prompt) + end)
        pieces: list[Piece] = []
        left = answers
        while left:
            text = written[left[-1]]
            covered = [index for index in left if text.startswith(written[index][: spans[index][1]])]
            pieces.append(self._with_literals(Piece(text, tuple(spans[index] for index in covered)), conversation, left[-1] + 1))
            left = [index for index in left if index not in covered]
        return pieces[::-1]

    def _marked_piece(self, conversation: Conversation, answers: list[int]) -> Piece:
        """Return the conversation with the spans between markers, and the end-of-turn token after them, in the loss."""
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
        variables: dict[str, Any] = {**self.tokenizer.special_tokens_map, **conversation.template_kwargs}
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

    def _with_literals(self, piece: Piece, conversation: Conversation, count: int) -> Piece:
        """Find the row's control-token strings in the written text by writing it again with brackets around them."""
        messages = conversation.messages[:count]
        own = list(strings([*messages, conversation.tools, conversation.template_kwargs]))
        found = next((hit for text in own if (hit := self.control.search(text))), None)
        if found is None:
            return piece
        if any(mark in text for mark in BRACKETS for text in own):
            raise BadRow(f"contains {found.group()} and one of the noncharacters U+FDD0 and U+FDD1")
        marked = Conversation(
            messages=tuple(bracketed(message, self.control) for message in messages),
            tools=tuple(bracketed(tool, self.control) for tool in conversation.tools) if conversation.tools else None,
            template_kwargs=bracketed(conversation.template_kwargs, self.control),
        )
        text, spans = unbracketed(self._write(marked.messages, marked))
        if text != piece.text:
            raise BadRow(f"contains {found.group()} where the chat template rewrites the text, so it looks like a control token")
        return Piece(piece.text, piece.in_loss, spans)


def strings(value: Any) -> Iterator[str]:
    """Yield every string inside lists and dicts, without keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from strings(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from strings(entry)


def bracketed(value: Any, control: re.Pattern[str]) -> Any:
    """Return the same structure with :data:`BRACKETS` around every control-token string."""
    if isinstance(value, str):
        return control.sub(lambda found: BRACKETS[0] + found.group() + BRACKETS[1], value)
    if isinstance(value, Mapping):
        return {key: bracketed(entry, control) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [bracketed(entry, control) for entry in value]
    return value


def unbracketed(written: str) -> tuple[str, tuple[Span, ...]]:
    """Return `written` without brackets, and the spans that were between them."""
    opening, closing = BRACKETS
    text, spans = "", []
    for part in re.split(f"({opening}[^{opening}{closing}]*{closing})", written):
        inner = part.strip(opening + closing) if part.startswith(opening) else part
        if part.startswith(opening):
            spans.append((len(text), len(text) + len(inner)))
        text += inner
    return text, tuple(spans)


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer: the model's, the tokenizer's and the chat template's."""
    own: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    found: list[Any] = [own] if isinstance(own, int) else list(own or ())
    if tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
        try:
            text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        except Exception:  # a template is foreign code; one that refuses this conversation says nothing about its end
            text = ""
        after = tokenizer(text.rpartition(PROBE)[2], add_special_tokens=False).input_ids
        special = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
        found += [token for token in after[:1] if token in special]
    return sorted({int(token) for token in found})
