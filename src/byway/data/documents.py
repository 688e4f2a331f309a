"""The kinds of documents a row can be, independent of its keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Completion", "Conversation", "Document", "Labelled", "Message", "Text", "Tokens"]

Message = dict[str, Any]
"""``{"role": "system" | "user" | "assistant" | "tool", "content": str, ...}``, plain JSON for a chat template."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One row. ``where``: its address."""

    where: str = ""

    def unusable(self) -> str:
        """Return the reason for dropping the row: nothing in it can be in the loss; ``""`` if it is usable."""
        return ""


@dataclass(frozen=True, kw_only=True)
class Text(Document):
    """A whole text; all of its tokens are in the loss."""

    text: str

    def unusable(self) -> str:
        """Refuse blank text."""
        return "" if self.text.strip() else "the text is empty"


@dataclass(frozen=True, kw_only=True)
class Completion(Document):
    """A prompt and its completion, both text that the model sees unchanged."""

    prompt: str
    completion: str

    def unusable(self) -> str:
        """Refuse a blank completion."""
        return "" if self.completion.strip() else "the completion is empty"


@dataclass(frozen=True, kw_only=True)
class Conversation(Document):
    """Messages for the model's chat template.

    ``tools``: JSON schemas of the functions that may be called, or None. ``unweighted``: indices of messages that are
    context only (``"weight": 0`` in the row). ``context``: number of leading messages that are context only (the prompt
    of a prompt/completion pair). ``template_kwargs``: further variables for the template.
    """

    messages: tuple[Message, ...]
    tools: tuple[Message, ...] | None = None
    unweighted: frozenset[int] = frozenset()
    context: int = 0
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    def unusable(self) -> str:
        """Refuse conversations without messages, question or final answer, or with more than one system message."""
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
        asked = any(message["content"].strip() for message in self.messages if message["role"] in ("user", "tool"))
        if not asked and "system" not in roles:
            return "the question is empty"
        last = self.messages[-1]
        if not last["content"].strip() and not last.get("tool_calls"):
            return "the last answer is empty"
        if not self.answers():
            return "every answer has weight 0"
        return ""

    def answers(self) -> list[int]:
        """Return the indices of the assistant messages that may be in the loss."""
        return [
            index
            for index, message in enumerate(self.messages)
            if message["role"] == "assistant" and index >= self.context and index not in self.unweighted
        ]


@dataclass(frozen=True, kw_only=True)
class Tokens(Document):
    """Token ids and labels of the same length, unshifted; the label -100 is not in the loss."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    def unusable(self) -> str:
        """Refuse a row without tokens."""
        return "" if self.input_ids else "there are no tokens"


@dataclass(frozen=True, kw_only=True)
class Labelled(Document):
    """One text or a pair of texts, and its class (a name or an index)."""

    texts: tuple[str, ...]
    label: int | str

    def unusable(self) -> str:
        """Refuse a row whose texts are all blank."""
        return "" if any(text.strip() for text in self.texts) else "the text is empty"
