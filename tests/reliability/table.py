"""The form of the reliability table: a check is a number, a fault, and the cases and tests that prove it is handled.

A :class:`Case` causes the fault in its own folder and runs the command line (or one call of the Python API if there is
no command). ``test_checks.py`` asserts what the case states: the exit code, the words of the one message, and that
nothing was written. ``proofs`` name tests elsewhere that already prove a check; the runner asserts that they exist.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byway.errors import BywayError

Action = Sequence[str] | Callable[[], object]
"""Arguments of the command line, or a call of the Python API."""


@dataclass(frozen=True)
class Shared:
    """Directories made once for all cases; cases only read them."""

    base: Path
    """A Llama of 2 layers, hidden 32, with a byte-level tokenizer and a chat template."""
    adapter: Path
    """A trained rank-4 LoRA on its q_proj and v_proj."""
    run: Path
    """A finished run of 3 steps with a checkpoint after each; its recipe is `World.recipe()`."""


@dataclass(frozen=True)
class World:
    """One case's folder, which is the current directory while it runs."""

    root: Path
    shared: Shared

    def write(self, name: str, content: str | bytes) -> str:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return name

    def rows(self, *rows: Any, name: str = "rows.jsonl") -> str:
        """Write a file of rows: objects, or lines as given."""
        return self.write(name, "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))

    def recipe(self, text: str | None = None, /, **sections: Mapping[str, Any] | str | None) -> str:
        """Write ``recipe.yaml``: `text`, or a valid recipe over three texts with some keys replaced or added."""
        return self.write("recipe.yaml", json.dumps(recipe(self.shared.base, **sections)) if text is None else text)

    def texts(self) -> str:
        """Write the training rows of the valid recipe."""
        return self.rows(*TEXTS, name="train.jsonl")

    def train(self, *arguments: str, **sections: Mapping[str, Any] | str | None) -> list[str]:
        """Return ``byway train`` of a valid recipe, with these overrides and options."""
        self.texts()
        return ["train", self.recipe(None, **sections), *arguments]

    def own_base(self) -> Path:
        """Copy the base, so that the case may damage it."""
        return Path(shutil.copytree(self.shared.base, self.root / "base"))

    def hollow(self) -> str:
        """Make a directory that looks like a base until it is loaded: an error in another place must come first."""
        self.write("hollow/config.json", "{}")
        return "hollow"

    def own_adapter(self, name: str = "adapter") -> Path:
        return Path(shutil.copytree(self.shared.adapter, self.root / name))

    def own_run(self) -> Path:
        """Copy the finished run to the output directory of the valid recipe."""
        self.texts()
        return Path(shutil.copytree(self.shared.run, self.root / "run"))

    def use(self, adapter: Path | str, base: Path | None = None) -> list[str]:
        """Return ``byway generate`` with an adapter: it loads the base, then the adapter, strictly."""
        base = self.shared.base if base is None else base
        return ["generate", str(adapter), "--base", str(base), "-p", "one two", "--max-new-tokens", "2"]


TEXTS = [{"text": f"{word} one two three four five six"} for word in ("seven", "eight", "nine")]


def recipe(base: Path, /, **sections: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """Return a recipe of three steps on the CPU; mappings are merged into sections, other values replace them."""
    made: dict[str, Any] = {
        "base": {"model": str(base), "device": "cpu"},
        "method": {"name": "lora", "rank": 4, "targets": ["q_proj", "v_proj"]},
        "data": {"train": "train.jsonl", "task": "text", "max_length": 64},
        "train": {"rows_per_step": 1, "learning_rate": 1e-2, "save_every": 1, "keep_checkpoints": 9, "threads": 1},
        "output": "run",
    }
    for name, given in sections.items():
        made[name] = {**made.get(name, {}), **given} if isinstance(given, Mapping) else given
    return made


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to cause the fault, and the expected result."""

    make: Callable[[World], Action]
    """Prepare the folder and return the action to run."""
    code: int = 2
    says: tuple[str, ...]
    """Words of the message (of all output if the exit code is 0)."""
    error: type[BywayError] | None = None
    """For calls of the Python API: the class of the error."""
    seconds: float | None = None
    """Largest processor time in seconds."""
    writes: bool = False
    """True if files may change (a run that was started)."""
    then: Callable[[World], None] | None = None
    """Further assertions afterwards."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One row of the table."""

    number: str
    fault: str
    cases: Mapping[str, Case]
    """Name → case."""
    proofs: tuple[str, ...] = ()
    """``file::test`` of tests elsewhere that prove the rest."""
    later: str = ""
    """The part of the check that cannot occur yet, and why; a case shows the error."""


class Later(str):
    """Why a part of a check cannot occur yet."""


def check(number: int | str, fault: str, /, *proofs: str | Later, **cases: Case) -> Check:
    """Return a row: tests elsewhere (and a :class:`Later`) by position, cases by name."""
    later = next((entry for entry in proofs if isinstance(entry, Later)), "")
    named = tuple(entry for entry in proofs if not isinstance(entry, Later))
    return Check(number=str(number), fault=fault, cases=cases, proofs=named, later=str(later))
