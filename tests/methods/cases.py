"""Which methods go with which families in the contract, and with what fields where a default would not fit the tiny models."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from byway import methods
from byway.core import Method
from tests.tiny import DECODERS, FAMILIES

FIELDS: dict[str, dict[str, Any]] = {}
"""Method → fields for the tiny models (hidden 32, three layers); what is not here runs with its defaults."""

REFUSED: dict[tuple[str, str], str] = {}
"""(method, family) that do not go together → what the error says."""

PAIRS = [(name, family) for name in methods.names() for family in FAMILIES if (name, family) not in REFUSED]
DECODER_PAIRS = [(name, family) for name, family in PAIRS if family in DECODERS]
WITH_LAYERS = [name for name in methods.names() if "layers" in {f.name for f in fields(methods.load(name))}]


def method_of(name: str, **changes: Any) -> Method:
    """The method of that name as the contract uses it."""
    return methods.load(name)(**(FIELDS.get(name, {}) | changes))
