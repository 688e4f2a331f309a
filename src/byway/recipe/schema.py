"""JSON schema of a recipe, for editors and other programs."""

from __future__ import annotations

from typing import Any

from byway import methods as registry
from byway.core.fields import json_schema
from byway.recipe.reading import SECTIONS

__all__ = ["schema"]


def schema() -> dict[str, Any]:
    """JSON schema of a recipe, with the fields of every method that exists."""
    methods: list[dict[str, Any]] = []
    for name in registry.names():
        entry = json_schema(registry.load(name))
        entry["properties"] = {"name": {"const": name}} | entry["properties"]
        methods.append(entry | {"title": name, "required": ["name", *entry.get("required", [])]})
    own = {
        "type": "object",
        "title": "package.module:Class",
        "description": "A method of one's own, by import path; its fields are its keys.",
        "properties": {"name": {"type": "string", "pattern": "^[\\w.]+:\\w+$"}},
        "required": ["name"],
    }
    one: dict[str, Any] = {"anyOf": [*methods, own]}
    properties = {name: json_schema(section) for name, section in SECTIONS.items()}
    properties["method"] = {
        "description": "What is trained; a list: several, in hook order.",
        "anyOf": [one, {"type": "array", "items": one}],
    }
    properties["output"] = {"type": "string", "description": "The run's directory; relative to the current one."}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Byway recipe",
        "type": "object",
        "properties": {name: properties[name] for name in ("base", "method", "data", "train", "engine", "output")},
        "required": ["method", "data", "output"],
        "additionalProperties": False,
    }
