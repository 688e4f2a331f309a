"""Write what the documentation lists from the code itself: ``python docs/reference.py``; with ``--check`` only say what is out of date.

A page marks such a part with ``<!-- begin: NAME -->`` and ``<!-- end: NAME -->``; whatever stands between is replaced.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "docs/architecture.md",
    "docs/recipe.md",
    *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs" / "methods").glob("*.md")),
)
_PART = re.compile(r"(<!-- begin: ([\w: -]+) -->\n).*?(<!-- end: \2 -->)", re.DOTALL)


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _fields(cls: type) -> str:
    from byway.core.fields import described, field_docs, hints, plain, shown

    docs, rows = field_docs(cls), []
    for f in fields(cls):
        default: Any = f.default if f.default_factory is MISSING else f.default_factory()
        text = "required" if default is MISSING else f"`{default if isinstance(default, str) else shown(plain(default))}`"
        meaning = "".join(
            part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(re.split(r"(`[^`]*`)", docs[f.name].replace("``", "`")))
        )
        rows.append([f"`{f.name}`", described(hints(cls)[f.name]), text, meaning])
    return _table(["key", "takes", "default", "meaning"], rows)


def section(name: str) -> str:
    """The keys of a section of a recipe."""
    from byway.recipe.reading import SECTIONS

    return _fields(SECTIONS[name])


def method(name: str) -> str:
    """The fields of a method."""
    from byway import methods

    return _fields(methods.load(name))


def aliases() -> str:
    """What other trainers call our keys."""
    from byway.recipe.aliases import ALIASES, IGNORED

    rows = []
    for alias in ALIASES:
        notes = []
        if alias.values is not None:
            read = [f"`{_said(v)}`" + (f" → {_sets(sets, alias.key)}" if sets else " (nothing)") for v, sets in alias.values.items()]
            notes.append(", ".join(read))
        if alias.factor:
            notes.append("a factor: rows a device × accumulation are multiplied")
        if alias.block_only:
            notes.append("in MindFormers' blocks only")
        rows.append([f"`{alias.key}`", ", ".join(f"`{n}`" for n in alias.names.split()), "; ".join(notes)])
    for entry in IGNORED:
        values = ", ".join(f"`{v}`" for v in entry.values)
        rows.append(["no effect", ", ".join(f"`{n}`" for n in entry.names.split()), entry.why + (f"; {values}" if values else "")])
    return _table(["ours", "also understood", "values"], rows)


def _said(value: Any) -> str:
    from byway.core.fields import shown

    return value if isinstance(value, str) else shown(value)


def _sets(values: Any, own: str) -> str:
    return ", ".join(f"`{_said(v)}`" if key == own else f"`{key}: {_said(v)}`" for key, v in values.items())


def commands() -> str:
    """The commands that exist."""
    from byway.cli import COMMANDS, available

    return _table(["command", "what it does"], [[f"`byway {name}`", COMMANDS[name]] for name in available()])


def methods_table() -> str:
    """The methods that exist."""
    from byway import methods
    from byway.core.fields import summary_line

    rows = []
    for name in methods.names():
        cls = methods.load(name)
        files = "HF peft's" if cls.peft else "Byway's own"
        rows.append([f"[`{name}`](docs/methods/{name}.md)", f"`byway.{cls.__name__}`", summary_line(cls), cls.merging(), files])
    return _table(["recipe", "Python", "what it is", "mergeable", "files"], rows)


def tree() -> str:
    """Every file of the package with the first line of its docstring."""
    package = ROOT / "src" / "byway"
    lines = []
    for folder in [package, *sorted(p.parent for p in package.rglob("__init__.py") if p.parent != package)]:
        files = sorted(folder.glob("*.py"), key=lambda p: (p.name != "__init__.py", p.name))
        lines += ["", f"{folder.relative_to(package.parent)}/"]
        for file in files:
            doc = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").splitlines()
            lines.append(f"  {file.name:<20} {doc[0].replace('``', '').rstrip('.:') if doc else ''}".rstrip())
    return "```text\n" + "\n".join(lines).strip() + "\n```\n"


PARTS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "methods": methods_table,
    "tree": tree,
    "aliases": aliases,
    **{name: (lambda name=name: section(name)) for name in ("base", "data", "train", "engine")},
}


def rendered(text: str) -> str:
    """`text` with every marked part written anew; KeyError for a part that nobody knows how to write."""
    return _PART.sub(lambda match: f"{match[1]}{_part(match[2])}{match[3]}", text)


def _part(name: str) -> str:
    """``fields of METHOD``, or one of :data:`PARTS`."""
    prefix = "fields of "
    return method(name.removeprefix(prefix)) if name.startswith(prefix) else PARTS[name]()


def main() -> int:
    """Write the pages, or with ``--check`` compare them; 1 if something is out of date."""
    stale = 0
    for name in PAGES:
        page = ROOT / name
        before = page.read_text(encoding="utf-8")
        after = rendered(before)
        if before != after:
            stale = 1
            print(f"{name}: {'out of date' if '--check' in sys.argv else 'written'}")
            if "--check" not in sys.argv:
                page.write_text(after, encoding="utf-8")
    return stale if "--check" in sys.argv else 0


if __name__ == "__main__":
    raise SystemExit(main())
