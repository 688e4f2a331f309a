"""Keys of a row that a chat template does not read, found by writing the row again without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from byway.data.bad_rows import BadRow
from byway.data.documents import Conversation
from byway.data.jinja.renderer import Job, Written

__all__ = ["REASONING", "Unread"]

REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names under which templates read the reasoning of an answer."""
_KNOWN = frozenset({"role", "content", "tool_calls"})
"""Keys whose use is checked otherwise."""
_SAID = frozenset({*REASONING, "function_call", "refusal"})
"""Keys that hold a part of what the assistant said: a row whose template drops one is not what it seems to be."""

Write = Callable[[Sequence[tuple[Conversation, Sequence[Job]]]], list[list[Written] | BadRow]]


@dataclass
class Unread:
    """Find the keys of messages, and the template variables of rows, that make no difference to the text.

    ``write``: write conversations with the template. ``names``: True if a key occurs in the template's source.
    """

    write: Write
    names: Callable[[str], bool]
    _read: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])
    _unread: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])

    def keys(self, conversation: Conversation) -> list[str]:
        """Return the keys of this row that the template does not read, once for each message.

        Raises:
            BadRow: one of them holds a part of an answer.
        """
        found: list[str] = []
        places: dict[tuple[str, str], list[int]] = {}
        for index, message in enumerate(conversation.messages):
            for key, value in message.items():
                if key not in _KNOWN and not _blank(value):
                    places.setdefault((message["role"], key), []).append(index)
        for (role, key), indices in places.items():
            if self._is_read(role, key, conversation, indices):
                continue
            if role == "assistant" and key in _SAID:
                raise BadRow(
                    f"messages[{indices[0]}] has {key}, which the model's chat template drops "
                    f"(remove the key, or set data.template to a template that writes it)"
                )
            found += [f"{key} of the {role}'s messages"] * len(indices)
        # a variable may have the value that the template gives it anyway, so its text does not tell
        return found + [f"{key} in chat_template_kwargs" for key in conversation.template_kwargs if not self.names(key)]

    def _is_read(self, role: str, key: str, conversation: Conversation, indices: Sequence[int]) -> bool:
        """True if the text up to the first or the last message with the key, or the whole, changes without it."""
        if (role, key) in self._read or (role, key) in self._unread:
            return (role, key) in self._read
        counts = sorted({*(index + 1 for index in (*indices[:1], *indices[-1:])), len(conversation.messages)})
        pair = (conversation, _without(conversation, role, key))
        written = self.write([(each, [(count, False)]) for each in pair for count in counts])
        texts = [str(one) if isinstance(one, BadRow) else one for one in written]
        if texts[: len(counts)] != texts[len(counts) :]:
            self._read.add((role, key))
            return True
        if not self.names(key):  # another row makes no difference either
            self._unread.add((role, key))
        return False


def _blank(value: object) -> bool:
    """True for a value that says nothing."""
    return value is None or value in ("", [], {})


def _without(conversation: Conversation, role: str, key: str) -> Conversation:
    """Return a conversation without a key in the messages of a role; reasoning goes under all of its names."""
    gone = REASONING if key in REASONING else (key,)
    messages = [
        {name: value for name, value in message.items() if name not in gone} if message["role"] == role else message
        for message in conversation.messages
    ]
    return replace(conversation, messages=tuple(messages))
