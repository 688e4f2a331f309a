"""What a row can be, independent of the keys it came with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Completion", "Conversation", "Document", "Labelled", "Message", "Text", "Tokens"]

Message = dict[str, Any]
"""``{"role": "system" | "user" | "assistant" | "tool", "content": str, ...}``, plain JSON values as a chat template reads them."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """``where``: the address of the row it was made from."""

    where: str = ""

    def unusable(self) -> str:
        """Why nothing can be learned from it, as the reason under which it is counted; ``""`` when something can."""
        return ""


@dataclass(frozen=True, kw_only=True)
class Text(Document):
    """A whole text; every token of it is learned."""

    text: str

    def unusable(self) -> str:
        """Empty or blank text."""
        return "" if self.text.strip() else "the text is empty"


@dataclass(frozen=True, kw_only=True)
class Completion(Document):
    """A prompt and what follows it, both as text the model sees unchanged."""

    prompt: str
    completion: str

    def unusable(self) -> str:
        """Empty or blank completion."""
        return "" if self.completion.strip() else "the completion is empty"


@dataclass(frozen=True, kw_only=True)
class Conversation(Document):
    """Messages for the model's chat template.

    ``tools``: JSON schemas of the functions that may be called, or None. ``unlearned``: indices of assistant messages that are context only
    (``"weight": 0`` in the row). ``first_learned``: earlier messages are context too (the prompt of a prompt/completion pair).
    ``template_kwargs``: further variables for the template.
    """

    messages: tuple[Message, ...]
    tools: tuple[Message, ...] | None = None
    unlearned: frozenset[int] = frozenset()
    first_learned: int = 0
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    def unusable(self) -> str:
        """No messages, no question, more than one system message, or no answer at the end."""
        roles = [message["role"] for message in self.messages]
        if not roles:
            return "there are no messages"
        if roles.count("system") > 1:
            return "there is more than one system message"
        if set(roles) == {"system"}:
            return "there is only a system message"
        if roles[-1] != "assistant":
            return f"the last turn is the {roles[-1]}'s, not the assistant's"
        if roles.count("assistant") == len(roles):
            return "there is no turn before the assistant's"
        if (
            not any(message["content"].strip() for message in self.messages if message["role"] in ("user", "tool"))
            and "system" not in roles
        ):
            return "the question is empty"
        last = self.messages[-1]
        if not last["content"].strip() and not last.get("tool_calls"):
            return "the last answer is empty"
        if not self.answers():
            return "every answer has weight 0"
        return ""

    def answers(self) -> list[int]:
        """Indices of the assistant messages that may be learned."""
        return [
            index
            for index, message in enumerate(self.messages)
            if message["role"] == "assistant" and index >= self.first_learned and index not in self.unlearned
        ]


@dataclass(frozen=True, kw_only=True)
class Tokens(Document):
    """Token ids as they are; labels (-100 = not learned) of the same length, unshifted."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    def unusable(self) -> str:
        """No tokens."""
        return "" if self.input_ids else "there are no tokens"


@dataclass(frozen=True, kw_only=True)
class Labelled(Document):
    """One text or a pair, and its class (a name or an index)."""

    texts: tuple[str, ...]
    label: int | str

    def unusable(self) -> str:
        """All texts blank."""
        return "" if any(text.strip() for text in self.texts) else "the text is empty"
