"""What stands in the pages: code blocks, commands, links and named tests, with where they stand."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")))
sys.path += [str(ROOT / "docs"), str(ROOT / "docs" / "figures")]  # their scripts are no package


@dataclass(frozen=True)
class Block:
    """One fenced block. ``where``: ``page:line`` of its first line."""

    where: str
    language: str
    text: str


def blocks(page: Path, language: str = "") -> list[Block]:
    """The fenced blocks of a page, without their indentation; of one language if it is given."""
    found: list[Block] = []
    fence = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
    text = page.read_text(encoding="utf-8")
    for match in fence.finditer(text):
        lines = [line.removeprefix(match[1]) for line in match[3].splitlines()]
        where = f"{page.relative_to(ROOT)}:{text[: match.start(3)].count(chr(10)) + 1}"
        found.append(Block(where, match[2], "\n".join(lines) + "\n"))
    return [block for block in found if language in ("", block.language)]


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """(where, words) of every command in a ``sh`` block, a ``$`` line or inline code of a page: those that begin with byway or make."""
    lines = [(b.where, line) for b in blocks(page, "sh") for line in b.text.splitlines()]
    lines += [(b.where, line[2:]) for b in blocks(page, "text") for line in b.text.splitlines() if line.startswith("$ ")]
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines += [(str(page.relative_to(ROOT)), code) for code in re.findall(r"`([^`\n]+)`", prose)]
    found = []
    for where, line in lines:
        if not re.match(r"(byway|make) ", line):
            continue
        found.append((where, shlex.split(line, comments=True)))
    return found
