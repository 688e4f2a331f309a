"""Write a conversation with the model's own chat template, and find the characters that are in the loss.

The loss covers what the model has to write when it is served. With ``P = template(messages before a turn, generation
prompt)`` and ``A = template(messages up to and including it)``, ``A`` must begin with ``P``; the rest of ``A``, up to
and including its end-of-turn token, is in the loss. Nothing else is assumed about the template. Some templates rewrite
earlier turns once later ones follow (Qwen3 drops their thinking): each turn is then trained in the text it would be
served in, so that one row becomes several examples. In a template with ``{% generation %}`` markers, the markers
decide.

A string of a control token inside a message stays text, in training and in prompts.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from byway.data.bad_rows import BadRow, snippet
from byway.data.control import BRACKETS, Control, Span, added_ids, alternatives, bracketed, strings, unbracketed
from byway.data.documents import Conversation, Message
from byway.data.jinja.renderer import Job, Refused, Renderer, Request, Written
from byway.data.unread import REASONING, Unread
from byway.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ChatTemplate", "Learn", "Piece", "set_template", "stop_tokens", "template_text"]

Learn = Literal["responses", "last", "all"]

PROBE = "Kestrel47"
"""A word that no template contains; its place in the output shows what the template writes around a message."""
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
FEATURES = {"system": "a system message", "tool": "a tool's answer", "tools": "tools", "tool_calls": "tool calls"}
LONGEST = 2**18
"""Maximum length of a template, in characters."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Text for the model. ``in_loss``: spans in the loss; ``literal``: strings of control tokens that stay text."""

    text: str
    in_loss: tuple[Span, ...] = ()
    literal: tuple[Span, ...] = ()


def template_text(template: str) -> str:
    """Return a template's Jinja text, given that or the path of a ``.jinja`` file."""
    if "{" in template:
        return template.removeprefix("\ufeff")
    path = Path(template).expanduser()
    if not path.is_file():
        raise ConfigError(f"data.template {template!r} is neither a file nor Jinja text", hint="use the path of a .jinja file")
    if path.stat().st_size > LONGEST:
        raise ConfigError(f"data.template {template!r} has {path.stat().st_size:,} bytes; a chat template has a few thousand")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.template {template!r} cannot be read: {error}", hint="save it as UTF-8 text") from error
    if "{" not in text:
        raise ConfigError(f"data.template {template!r} holds no Jinja: it would write the same for every conversation")
    return text


def set_template(tokenizer: PreTrainedTokenizerBase, template: str | None, variables: Mapping[str, Any]) -> None:
    """Make `template` (default: the tokenizer's own) with default values for `variables` the tokenizer's chat template.

    The defaults are written at its beginning, so that every program that reads the template writes the same text.
    """
    found: Any = tokenizer.chat_template if template is None else template_text(template)
    if not found:
        return
    kinds: dict[str, str] = found if isinstance(found, dict) else {"": found}
    # as Jinja reads line breaks, and as a file would give them back
    made = {kind: _defaults(variables) + text.replace("\r\n", "\n").replace("\r", "\n") for kind, text in kinds.items()}
    tokenizer.chat_template = made if isinstance(found, dict) else made[""]  # pyright: ignore[reportAttributeAccessIssue]


def _defaults(variables: Mapping[str, Any]) -> str:
    """Return Jinja text that gives `variables` their values unless they are given. It writes nothing."""
    # a block's own line break is not written (trim_blocks), so the text after it still begins a line
    return "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {_constant(value)} %}}{{% endif %}}\n" for name, value in variables.items()
    )


def _constant(value: Any) -> str:
    """Return a JSON value as a Jinja expression."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_constant(str(key))}: {_constant(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_constant, value)) + "]"
    if isinstance(value, str):  # in Jinja an escape is one code unit, so what is beyond ASCII is written as it is
        return json.dumps(value, ensure_ascii=False)
    return repr(value)


class ChatTemplate:
    """The chat template of a tokenizer, or `template` in its place: Jinja text or the path of a ``.jinja`` file.

    Args:
        learn: ``responses``: the assistant's turns are in the loss; ``last``: the last message; ``all``: every token.
        variables: variables for the template; those of a conversation come first.

    Raises:
        ConfigError: there is no template, or it cannot be used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        learn: Learn = "responses",
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer: Any = tokenizer
        self.learn: Learn = learn
        self.template = None if template is None else template_text(template)
        if self.template is None and not tokenizer.chat_template:
            raise ConfigError(
                "the model has no chat template, so conversations cannot be written for it",
                hint="use an instruct model, set data.template to a .jinja file, or convert the rows to text or prompt/completion",
            )
        given = template if template is not None and "{" not in template else ""
        self.name = f"data.template {given}".rstrip() if self.template else f"the chat template of {tokenizer.name_or_path or 'the model'}"
        self.variables = {**self.tokenizer.special_tokens_map, **(variables or {})}
        self._renderers: dict[str, Renderer] = {}
        self.marked = bool(GENERATION.search(self._source(None)))
        self.features: dict[str, bool] = {}
        self.ignored: Counter[str] = Counter()
        """What conversations hold that the template does not read, with the number of times."""
        self.added = alternatives({token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens))
        self._probed = self._probe()
        self.tail, self.end = self._ending()
        named: Any = tokenizer.chat_template
        sources = [self.template] if self.template is not None else list(named.values()) if isinstance(named, dict) else [named]
        literals = [text for source in sources for text in self._renderer(source).literals]
        words = {word for source in sources for word in re.findall(r"\w+", source)}
        self._unread = Unread(self._write_all, words.__contains__)
        self.control = Control(tokenizer, [*literals, *(written.text for written in self._probed)])

    @property
    def ends_turns(self) -> bool:
        """True if the template ends an answer with a control token, from which the model learns to stop."""
        return self.tail is None or bool(self.added.search(self.end))

    def stops(self) -> list[int]:
        """Return the token with which the template ends an answer, if it does."""
        after = self.tokenizer(self.tail or "", add_special_tokens=False).input_ids
        return [token for token in after[:1] if token in added_ids(self.tokenizer)]

    def prompt(self, conversation: Conversation) -> Piece:
        """Return the conversation with the generation prompt after it. Raises BadRow if the template refuses it."""
        (written,) = self._write(conversation, [(len(conversation.messages), True)])
        return self._with_literals(Piece(written.text), conversation, (len(conversation.messages), True))

    def pieces(self, conversations: Sequence[Conversation]) -> list[list[Piece] | BadRow]:
        """Return each conversation as one piece of text, or several if the template rewrites earlier turns.

        A BadRow in place of one that the template refuses, or of which it would drop a part.

        Raises:
            ConfigError: nothing can be learned from what the template writes.
        """
        self._check_answers()
        answers = [self._learned(conversation) for conversation in conversations]
        asked = [(each, self._jobs(each, learned)) for each, learned in zip(conversations, answers, strict=True)]
        found: list[list[Piece] | BadRow] = []
        for conversation, learned, written in zip(conversations, answers, self._write_all(asked), strict=True):
            try:
                self._check_features(conversation)
                if isinstance(written, BadRow):
                    raise written
                self.ignored.update(self._unread.keys(conversation))
                found.append(self._cut(conversation, learned, written))
            except BadRow as error:
                found.append(error)
        return found

    def _learned(self, conversation: Conversation) -> list[int]:
        """Return the indices of the answers in the loss."""
        last = len(conversation.messages) - 1
        return [index for index in conversation.answers() if index > 0 and (self.learn != "last" or index == last)]

    def _jobs(self, conversation: Conversation, answers: Sequence[int]) -> list[Job]:
        """Return the texts that are needed to learn `answers`."""
        whole = (len(conversation.messages), False)
        if self.learn == "all" or not answers:
            return [whole]
        if self.marked:
            return [*((index, False) for index in _turns(conversation) if index), whole]
        return [job for index in answers for job in ((index, True), (index + 1, False))]

    def _cut(self, conversation: Conversation, answers: list[int], written: Sequence[Written]) -> list[Piece]:
        """Return the pieces of a conversation, given what the template wrote for its :meth:`_jobs`."""
        if self.learn == "all":
            piece = Piece(written[0].text, ((0, len(written[0].text)),))
            return [self._with_literals(piece, conversation, (len(conversation.messages), False))]
        if not answers:
            return []
        return [self._marked_piece(conversation, answers, written)] if self.marked else self._prefix_pieces(conversation, answers, written)

    def _source(self, tools: Any) -> str:
        """Return the text of the template for conversations with or without tools; a model may have one for each."""
        if self.template is not None:
            return self.template
        try:
            return str(self.tokenizer.get_chat_template(None, tools))
        except ValueError as error:  # several templates, and none is the default
            raise ConfigError(f"{self.name}: {error}", hint="set data.template to a .jinja file") from error

    def _renderer(self, source: str) -> Renderer:
        if source not in self._renderers:
            if len(source) > LONGEST:
                raise ConfigError(f"{self.name} has {len(source):,} characters; a chat template has a few thousand")
            self._renderers[source] = Renderer(source, self.name)
        return self._renderers[source]

    def _write(self, conversation: Conversation, jobs: Sequence[Job]) -> list[Written]:
        """Return what the template writes for each job. Raises BadRow if it refuses the conversation."""
        (written,) = self._write_all([(conversation, jobs)])
        if isinstance(written, BadRow):
            raise written
        return written

    def _write_all(self, asked: Sequence[tuple[Conversation, Sequence[Job]]]) -> list[list[Written] | BadRow]:
        """Return what the template writes for each conversation and its jobs, or why it refuses it."""
        found: list[list[Written] | BadRow] = []
        for source, group in groupby(asked, key=lambda each: self._source(each[0].tools)):
            results = self._renderer(source).write(self._request(conversation, jobs) for conversation, jobs in group)
            for result in results:
                why = snippet(str(result), width=80) if isinstance(result, Refused) else ""
                found.append(BadRow(f"is refused by the chat template: {why}") if isinstance(result, Refused) else result)
        return found

    def _request(self, conversation: Conversation, jobs: Sequence[Job]) -> Request:
        messages = [_with_reasoning(message) for message in conversation.messages]
        return Request(messages, jobs, list(conversation.tools or ()) or None, self.variables | conversation.template_kwargs)

    def _probe(self) -> list[Written]:
        """Return a question with its prompt, and the same with its answer; nothing if the template refuses them."""
        probe = Conversation(messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}))
        try:
            return self._write(probe, [(1, True), (2, False)])
        except BadRow:  # it may want a system message; each row is refused with its own message
            return []

    def _check_answers(self) -> None:
        """Raise ConfigError if the template drops an answer, or writes another text than it prompts for."""
        if not self._probed:
            return
        prompt, whole = (written.text for written in self._probed)
        if not self.marked and not whole.startswith(prompt):
            common = next((index for index, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole)))
            raise ConfigError(
                f"the generation prompt of the chat template ends with {prompt[common:][:40]!r}, but its answers begin with "
                f"{whole[common:][:40]!r}: the model would be served another text than it was trained on",
                hint="set data.template to a .jinja file with {% generation %} markers around the text to train on",
            )
        if PROBE not in whole:
            raise ConfigError("the chat template drops the assistant's text", hint="set data.template to another .jinja file")

    def _ending(self) -> tuple[str | None, str]:
        """Return what the template writes after an answer, and its part in the loss, up to its first control tokens."""
        if not self._probed or PROBE not in self._probed[1].text:
            return None, ""
        tail = self._probed[1].text.rpartition(PROBE)[2]
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
                    (written,) = self._write(probes[feature], [(len(probes[feature].messages), False)])
                    self.features[feature] = re.search(PROBE + r"(?!x)", written.text) is not None
                except BadRow:  # the template refuses the row too, with its own message
                    self.features[feature] = True
            if not self.features[feature]:
                raise BadRow(f"has {FEATURES[feature]}, which the model's chat template drops (set data.template to another template)")

    def _prefix_pieces(self, conversation: Conversation, answers: list[int], texts: Sequence[Written]) -> list[Piece]:
        """Return each answer in the latest text that contains it exactly as it would be served."""
        spans: dict[int, Span] = {}
        written: dict[int, str] = {}
        for index, before, after in zip(answers, texts[::2], texts[1::2], strict=True):
            prompt, written[index] = before.text, after.text
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
            piece = Piece(text, tuple(spans[index] for index in covered))
            pieces.append(self._with_literals(piece, conversation, (left[-1] + 1, False)))
            left = [index for index in left if index not in covered]
        return pieces[::-1]

    def _marked_piece(self, conversation: Conversation, answers: list[int], written: Sequence[Written]) -> Piece:
        """Return the conversation with the spans between markers, and the end-of-turn token after them, in the loss."""
        every = _turns(conversation)
        *before, whole = written
        text, marks = whole.text, list(whole.marks)
        if answers != every:
            counts = [0] * (len(every) - len(before)) + [len(part.marks) for part in before]
            ends = [*counts[1:], len(marks)]
            marks = [mark for index, start, end in zip(every, counts, ends, strict=True) if index in answers for mark in marks[start:end]]
        spans: list[Span] = []
        for start, end in marks:
            if self.end and not text[start:end].rstrip().endswith(self.end.strip()) and text.startswith(self.end, end):
                end += len(self.end)
            end = start + len(text[start:end].rstrip())
            if end > start:
                spans.append((start, end))
        return self._with_literals(Piece(text, tuple(spans)), conversation, (len(conversation.messages), False))

    def _with_literals(self, piece: Piece, conversation: Conversation, job: Job) -> Piece:
        """Find the row's control-token strings in the written text by writing it again with brackets around them.

        In an assistant's turn a template may look for such strings itself and write its own (Qwen3: ``</think>``); what
        it writes is a control token. Everything that it copies stays text.
        """
        shown = replace(conversation, messages=conversation.messages[: job[0]])
        own = list(strings([shown.messages, shown.tools, shown.template_kwargs]))
        found = next((text[slice(*spans[0])] for text in own if (spans := self.control.spans(text))), None)
        edges = any(self.control.edges(text) for text in own)
        if found is None and not edges:
            return piece
        if any(mark in text for mark in BRACKETS for text in own):
            raise BadRow(f"contains {found or 'a part of a control token'} and one of the noncharacters U+FDD0 and U+FDD1")
        spans = self._copied(piece.text, shown, job[1], edges=True) if edges else None
        if spans is None and found is not None:
            spans = self._copied(piece.text, shown, job[1])
        if spans is None and found is not None:
            spans = self._copied(piece.text, shown, job[1], skip=self._looked_for(piece.text, shown, job[1]))
        if spans is None and found is not None:
            raise BadRow(f"contains {found} where the chat template rewrites the text, so it looks like a control token")
        tokens = [match.span() for match in self.control.pattern.finditer(piece.text)]
        kept = [
            (start, end)
            for start, end in spans or ()
            if self.control.spans(piece.text[start:end]) == [(0, end - start)] or any(start < b and a < end for a, b in tokens)
        ]
        return Piece(piece.text, piece.in_loss, tuple(kept))

    def _copied(
        self, text: str, shown: Conversation, prompt: bool, *, edges: bool = False, skip: Collection[str] = ()
    ) -> Sequence[Span] | None:
        """Return where `text` has strings of control tokens that it took from the row; None if brackets change it.

        `skip`: strings that are left alone in what the assistant says.
        """

        def marked(value: Any, skip: Collection[str] = ()) -> Any:
            return bracketed(value, self.control, edges=edges, skip=skip)

        def message(one: Message) -> Message:
            said = {key: value for key, value in one.items() if key != "tool_calls"} if one["role"] == "assistant" else {}
            return {key: marked(value, skip if key in said else ()) for key, value in one.items()}

        again = replace(
            shown,
            messages=tuple(map(message, shown.messages)),
            tools=None if shown.tools is None else tuple(map(marked, shown.tools)),
            template_kwargs=marked(shown.template_kwargs),
        )
        try:
            (written,) = self._write(again, [(len(again.messages), prompt)])
        except BadRow:  # it looks at a text that now has brackets
            return None
        same, spans = unbracketed(written.text)
        return spans if same == text and all(self.control.whole(same[start:end]) for start, end in spans) else None

    def _looked_for(self, text: str, shown: Conversation, prompt: bool) -> set[str]:
        """Return the strings of added tokens in the assistant's turns that the template looks for; no special ones."""
        said = strings([message for message in shown.messages if message["role"] == "assistant"])
        names = {part[start:end] for part in said for start, end in self.control.spans(part)} - self.control.special
        return {name for name in names if self._copied(text, shown, prompt, skip=names - {name}) is None}


def _turns(conversation: Conversation) -> list[int]:
    """Return the indices of the assistant's turns."""
    return [index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]


def _with_reasoning(message: Message) -> Message:
    """Return a message without absent keys, its reasoning under each name that templates know, as transformers does."""
    present = {key: value for key, value in message.items() if value is not None}
    reasoning = next((present[key] for key in REASONING if key in present), None)
    return present if reasoning is None else {"thinking": reasoning, **present, "reasoning_content": reasoning}


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None = None) -> list[int]:
    """Return the tokens that end an answer: the model's, the tokenizer's and the chat template's.

    `template`: the tokenizer's chat template, if it was examined already.
    """
    own: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    found: list[Any] = [own] if isinstance(own, int) else list(own or ())
    if tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    if template is None and tokenizer.chat_template:
        template = ChatTemplate(tokenizer)
    return sorted({int(token) for token in [*found, *(template.stops() if template is not None else ())]})
