"""``byway methods``: what there is to train with."""

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


def run(name: Annotated[str | None, typer.Argument(help="One method: its fields with their meaning.")] = None) -> None:
    """List the methods: what each is, its fields with their defaults, whether it can be merged, and its file."""
    from byway import methods
    from byway.core.fields import described, field_docs, hints, summary_line

    if name is not None:
        cls = methods.load(name)
        docs = field_docs(cls)
        rows = [(f, _default(cls, f), described(hint), docs[f].replace("``", "")) for f, hint in hints(cls).items()]
        ui.table(f"{name}: {summary_line(cls)}", ["field", "default", "takes", "what it is"], rows)
        return
    classes = {each: methods.load(each) for each in methods.names()}
    rows = [(each, summary_line(cls), cls.merging(), _file(cls)) for each, cls in classes.items()]
    ui.table("", ["name", "what it is", "mergeable", "file"], rows)
    ui.out()
    defaults = [(each, "  ".join(f"{f.name}={_default(cls, f.name)}" for f in fields(cls))) for each, cls in classes.items()]
    ui.table("", ["name", "fields with their defaults"], defaults)
    ui.note("byway methods NAME explains a method's fields")


def _default(cls: type[Method], name: str) -> str:
    from byway.core.fields import plain, shown

    field = next(f for f in fields(cls) if f.name == name)
    if field.default is MISSING and field.default_factory is MISSING:
        return "(required)"
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return default if isinstance(default, str) else shown(plain(default))


def _file(cls: type[Method]) -> str:
    import byway

    path = Path(inspect.getfile(cls))
    home = Path(inspect.getfile(byway)).parent.parent
    return str(path.relative_to(home)) if path.is_relative_to(home) else str(path)
