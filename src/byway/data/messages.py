"""Convert messages, tools and tool calls, as rows hold them, to the form that chat templates read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from byway.data.bad_rows import BadRow, parsed, snippet
from byway.data.documents import Message
from byway.errors import listed, nearest

__all__ = ["as_json", "as_messages", "as_sharegpt", "as_text", "as_tools"]

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool", "function": "tool"}
"""Roles of the `messages` format → roles in templates."""

_FLAGS = ("weight", "loss", "train", "training")
"""Keys of a turn that say whether it is in the loss: of OpenAI's files, ms-swift's, axolotl's (two)."""
_PARTS = ("train_detail", "training_detail")
"""Keys of axolotl's turns that say which characters of a turn are in the loss."""
_TURN = frozenset({"from", "value", "role", "content", "tool_calls", *_FLAGS})
"""Keys of a ShareGPT turn that are read here; the template may read others."""

SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function_call": "call",
}
"""Speakers of the ShareGPT format → roles in templates; ``call`` is an assistant turn that consists of tool calls."""


def as_text(value: Any, what: str) -> str:
    """Return `value` if it is a string; raise BadRow otherwise (numbers are not converted)."""
    if not isinstance(value, str):
        shown = snippet(json.dumps(value, default=repr))
        advice = f': write it as "{shown}"' if isinstance(value, (int, float)) else ""
        raise BadRow(f"{what} is {shown}, not text{advice}")
    return value


def as_json(value: Any, what: str) -> Any:
    """Return the value, parsed if it is JSON text (tables and ShareGPT files store lists as text)."""
    if not isinstance(value, str):
        return value
    try:
        return parsed(value)
    except BadRow as error:
        raise BadRow(f"{what} is text that {error}") from None


def as_tools(value: Any) -> tuple[Message, ...] | None:
    """Return function schemas as ``{"type": "function", "function": {...}}``; None for an empty value."""
    if value is None or value == "" or value == []:
        return None
    found = as_json(value, "tools")
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise BadRow(f"tools is not a list of objects: {snippet(str(found))}")
    for tool in found:
        named = tool.get("function", tool)
        if not isinstance(named, dict) or not isinstance(named.get("name"), str):
            raise BadRow(f"a tool has no name: {snippet(json.dumps(tool))}")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in found) or None


def as_messages(value: Any, what: str) -> tuple[tuple[Message, ...], frozenset[int]]:
    """Return the messages and the indices of those that a flag takes out of the loss.

    Raises BadRow naming the message.
    """
    found = as_json(value, what)
    if not isinstance(found, (list, tuple)):
        raise BadRow(f"{what} is not a list")
    messages: list[Message] = []
    unweighted: set[int] = set()
    for index, entry in enumerate(found):
        place = f"{what}[{index}]"
        if not isinstance(entry, Mapping):
            raise BadRow(f"{place} is not an object: {snippet(str(entry))}")
        message = {key: item for key, item in entry.items() if item is not None and key not in _FLAGS}
        message["role"] = _role(message.get("role"), ROLES, place)
        message["content"] = _content(message.get("content", ""), place)
        if message.get("tool_calls"):
            message["tool_calls"] = [_call(call, place) for call in as_json(message["tool_calls"], f"{place}.tool_calls")]
        elif "content" not in entry:
            raise BadRow(f"{place} has no content: its keys are {listed(entry)}")
        if not _in_loss(entry, message["role"], place):
            unweighted.add(index)
        messages.append(message)
    return tuple(messages), frozenset(unweighted)


def as_sharegpt(value: Any) -> tuple[tuple[Message, ...], frozenset[int]]:
    """Return :func:`as_messages` of ``from``/``value`` turns (or ``role``/``content`` turns)."""
    found = as_json(value, "conversations")
    if not isinstance(found, (list, tuple)):
        raise BadRow("conversations is not a list")
    if found and all(isinstance(turn, Mapping) and "role" in turn and "from" not in turn for turn in found):
        return as_messages(found, "conversations")
    messages: list[Message] = []
    unweighted: set[int] = set()
    for index, turn in enumerate(found):
        place = f"conversations[{index}]"
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            raise BadRow(f"{place} lacks from or value: {snippet(json.dumps(turn, default=repr))}")
        role = _role(turn["from"], SPEAKERS, place)
        if not _in_loss(turn, "assistant" if role == "call" else role, place):
            unweighted.add(index)
        text = as_text(turn["value"], f"{place}.value")
        further = {key: item for key, item in turn.items() if item is not None and key not in _TURN}
        if role == "call":
            calls = as_json(text, f"{place}.value")
            calls = calls if isinstance(calls, list) else [calls]
            messages.append({**further, "role": "assistant", "content": "", "tool_calls": [_call(call, place) for call in calls]})
        else:
            messages.append({**further, "role": role, "content": text})
    return tuple(messages), frozenset(unweighted)


def _in_loss(turn: Mapping[str, Any], role: str, place: str) -> bool:
    """Read the flags of a turn; without one it is in the loss, as far as its role is. Raises BadRow."""
    if parts := next((key for key in _PARTS if turn.get(key)), None):
        raise BadRow(f"{place} has {parts}, but a turn can only be in the loss as a whole")
    given = {flag: turn[flag] for flag in _FLAGS if turn.get(flag) is not None}
    for flag, value in given.items():
        if value not in (0, 1):  # also true and false, 0.0 and 1.0
            raise BadRow(f"{place} has the {flag} {value!r}; it must be 0 or 1, true or false")
        if value and role != "assistant" and flag != "weight":
            raise BadRow(f"{place} has {flag}: true, but only the assistant's turns can be in the loss")
    if len({bool(value) for value in given.values()}) > 1:
        raise BadRow(f"{place} has contradictory flags: {', '.join(f'{flag} {value!r}' for flag, value in given.items())}")
    return all(given.values())


def _role(value: Any, known: Mapping[str, str], place: str) -> str:
    if not isinstance(value, str) or value not in known:
        close = nearest(value, known) if isinstance(value, str) else ""
        raise BadRow(f"{place} has the role {value!r}; {close or 'the roles are ' + listed(known)}")
    return known[value]


def _content(value: Any, place: str) -> str:
    """Return text, or the joined texts of a list of parts."""
    if isinstance(value, (list, tuple)):
        parts: list[str] = []
        for part in value:
            if isinstance(part, str):
                parts.append(part)
            elif isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
                parts.append(part["text"])
            else:
                raise BadRow(f"{place} has a part that is not text: {snippet(json.dumps(part, default=repr))}")
        return "".join(parts)
    return as_text(value, f"{place}.content")


def _call(call: Any, place: str) -> Message:
    """Return a tool call with its arguments as an object (templates would quote JSON text a second time)."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise BadRow(f"{place} has a tool call without a name: {snippet(json.dumps(call, default=repr))}")
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        arguments = as_json(arguments, f"{place}: the arguments of {inner['name']}") if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise BadRow(f"{place}: the arguments of {inner['name']} are not an object: {snippet(str(arguments))}")
    identity = {"id": call["id"]} if "id" in call else {}
    return {**identity, "type": "function", "function": {"name": inner["name"], "arguments": dict(arguments)}}
