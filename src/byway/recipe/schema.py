"""JSON schema of a recipe, for editors and other programs."""

from __future__ import annotations

from typing import Any

from byway import methods as registry
from byway.core.fields import json_schema
from byway.core.registry import IMPORT_PATH
from byway.recipe.reading import SECTIONS, TOP

__all__ = ["schema"]


_START = {"type": "string", "description": "Directory of an adapter, Byway's or peft's, whose tensors are the initial values."}


def schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, with the fields of every method."""
    methods: list[dict[str, Any]] = []
    for name in registry.names():
        entry = json_schema(registry.load(name))
        entry["properties"] = {"name": {"const": name}, "start": _START} | entry["properties"]
        methods.append(entry | {"title": name, "required": ["name", *entry.get("required", [])]})
    own = {
        "type": "object",
        "title": "package.module:Class",
        "description": "A method of your own, by import path; its fields are its keys.",
        "properties": {"name": {"type": "string", "pattern": IMPORT_PATH}, "start": _START},
        "required": ["name"],
    }
    started = {
        "type": "object",
        "title": "start",
        "description": "The method of an adapter to go on training; its fields may be replaced.",
        "properties": {"start": _START},
        "required": ["start"],
    }
    one: dict[str, Any] = {"anyOf": [*methods, own, started]}
    properties = {name: json_schema(section) for name, section in SECTIONS.items()} | {
        "method": {
            "description": "The method to train with, or a list of methods in hook order.",
            "anyOf": [one, {"type": "array", "items": one}],
        },
        "output": {"type": "string", "description": "Directory of the run, relative to the current one."},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Byway recipe",
        "type": "object",
        "properties": {name: properties[name] for name in TOP},
        "required": ["method", "data", "output"],
        "additionalProperties": False,
    }
