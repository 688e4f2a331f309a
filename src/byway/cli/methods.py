"""``byway methods``: the methods to train with, and their fields."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from byway.cli import ui

if TYPE_CHECKING:
    from byway.core.method import Method

__all__ = ["run"]


def run(name: Annotated[str | None, typer.Argument(metavar="NAME", help="A method: explain its fields.")] = None) -> None:
    """List the methods: description, fields and defaults, whether an adapter can be merged, and the source file."""
    import byway
    from byway import methods
    from byway.core.fields import described, field_docs, hints, summary_line

    if name is not None:
        cls = methods.load(name)
        docs = field_docs(cls)
        rows = [(f, _default(cls, f), described(hint), docs[f].replace("``", "")) for f, hint in hints(cls).items()]
        ui.table(f"{name}: {summary_line(cls)}", ["field", "default", "takes", "description"], rows)
        return
    classes = {each: methods.load(each) for each in methods.names()}
    home = Path(inspect.getfile(byway)).parent.parent
    files = {each: Path(inspect.getfile(cls)).relative_to(home) for each, cls in classes.items()}
    rows = [(each, summary_line(cls), cls.merging(), files[each]) for each, cls in classes.items()]
    ui.table("", ["name", "description", "mergeable", "file"], rows)
    ui.out()
    defaults = [(each, "  ".join(f"{f.name}={_default(cls, f.name)}" for f in fields(cls))) for each, cls in classes.items()]
    ui.table("", ["name", "fields and defaults"], defaults)
    ui.note("byway methods NAME explains the fields of a method")


def _default(cls: type[Method], name: str) -> str:
    from byway.core.fields import plain, required, shown

    field = next(f for f in fields(cls) if f.name == name)
    if required(field):
        return "(required)"
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return default if isinstance(default, str) else shown(plain(default))
