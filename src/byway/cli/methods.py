"""``byway methods``: the methods to train with, and their fields."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated

import typer

from byway.cli import ui

if TYPE_CHECKING:
    from byway.core.method import Method

__all__ = ["run"]

_MERGES = {"yes": "yes", "no": "no"}
_WIDTH = 46
"""Characters of a description: a line of the list fits a terminal of 80 columns."""


def run(name: Annotated[str | None, typer.Argument(metavar="NAME", help="A method: explain its fields.")] = None) -> None:
    """List the methods, or explain one: its fields and defaults, whether it can be merged, and its source file."""
    import byway
    from byway import methods
    from byway.core.fields import described, field_docs, hints, summary_line

    home = Path(inspect.getfile(byway)).parent.parent
    if name is not None:
        cls = methods.load(name)
        docs = field_docs(cls)
        rows = [(f, _default(cls, f), described(hint), docs[f].replace("``", "")) for f, hint in hints(cls).items()]
        file = Path(inspect.getfile(cls))
        ui.out(f"{name}: {summary_line(cls)}")
        ui.out(f"can be merged: {cls.merging()}; source: {file.relative_to(home) if file.is_relative_to(home) else file}\n")
        ui.table("", ["field", "default", "takes", "description"], rows)
        return
    classes = {each: methods.load(each) for each in methods.names()}
    words = {each: shorten(summary_line(cls), _WIDTH, placeholder=" …") for each, cls in classes.items()}
    rows = [(each, _MERGES.get(cls.merging(), "partly"), words[each]) for each, cls in classes.items()]
    ui.table("", ["name", "merges", "description"], rows)
    ui.note("byway methods NAME explains a method and its fields")


def _default(cls: type[Method], name: str) -> str:
    from byway.core.fields import plain, required, shown

    field = next(f for f in fields(cls) if f.name == name)
    if required(field):
        return "(required)"
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return default if isinstance(default, str) else shown(plain(default))
