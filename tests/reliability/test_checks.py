"""Run the reliability checks: each fault gives one clear message, the right exit code and no half-written file."""

from __future__ import annotations

import ast
import functools
import hashlib
import time
from pathlib import Path
from typing import Any

import pytest

from byway.cli import main, ui
from byway.errors import BywayError
from tests.reliability import checkpoint, config, data, files, matching, training
from tests.reliability.table import Action, Case, Check, Shared, World

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = {"config": config, "matching": matching, "files": files, "data": data, "training": training, "checkpoint": checkpoint}
TABLE: list[Check] = [row for section in SECTIONS.values() for row in section.CHECKS]
CASES = [(row, name, case) for row in TABLE for name, case in row.cases.items()]


def digest(*folders: Path) -> dict[str, str]:
    """Return everything below the folders: links by target, files by hash."""
    found: dict[str, str] = {}
    for entry in sorted(entry for folder in folders for entry in folder.rglob("*")):
        content = str(entry.readlink()).encode() if entry.is_symlink() else entry.read_bytes() if entry.is_file() else b""
        found[str(entry)] = hashlib.sha256(content).hexdigest()
    return found


def run(action: Action, wanted: type[BywayError] | None) -> int:
    """Return the exit code; an error of a Python call is printed as the command line would."""
    if not callable(action):
        return main(list(action))
    try:
        action()
    except BywayError as error:
        assert wanted is not None and type(error) is wanted, repr(error)
        ui.error(error.message, error.hint)
        return error.exit_code
    return 0


@pytest.mark.parametrize(("row", "case"), [pytest.param(row, case, id=f"{row.number}-{name}") for row, name, case in CASES])
def test_a_fault_gives_one_message_the_right_exit_code_and_nothing_half_written(
    row: Check, case: Case, world: World, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    action = case.make(world)
    common = (world.shared.base, world.shared.adapter, world.shared.run)
    before, shared_before, began = digest(world.root), digest(*common), time.process_time()
    capsys.readouterr()
    code = run(action, case.error)
    took = time.process_time() - began
    shown = capsys.readouterr()
    assert code == case.code, f"{row.fault}\n{shown.out}{shown.err}"
    lines = shown.err.splitlines()
    assert sum(line.startswith("error:") for line in lines) == (1 if code else 0), shown.err
    assert "Traceback" not in shown.out + shown.err and "bug in byway" not in shown.err
    said = shown.err[shown.err.index("error:") :] if code else shown.out + shown.err
    missing = [word for word in case.says if word not in said]
    assert not missing, f"{missing} not in:\n{said}"
    if not case.writes:
        assert digest(world.root) == before
    assert digest(*common) == shared_before
    assert case.seconds is None or took < case.seconds, f"{took:.1f} s"
    assert not calls, f"connected to {calls}"
    if case.then is not None:
        case.then(world)


def test_every_check_stands_in_the_table_once() -> None:
    assert [row.number for row in TABLE] == [str(n) for n in range(1, 12)] + ["11b", "11c"] + [str(n) for n in range(12, 61)]
    for row in TABLE:
        assert row.fault and (row.cases or row.proofs), row.number
        assert not row.later or row.cases, f"check {row.number}: a case must show the error of the missing part"


@functools.cache
def functions_of(file: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


PROOFS = sorted({proof for row in TABLE for proof in row.proofs})


@pytest.mark.parametrize("proof", PROOFS)
def test_a_test_that_the_table_leans_on_exists_and_is_not_skipped(proof: str) -> None:
    file, _, name = proof.partition("::")
    assert name.startswith("test_") and name in functions_of(file), f"{file} has no {name}"
    marks = " ".join(ast.unparse(mark) for mark in functions_of(file)[name].decorator_list)
    assert "skip" not in marks and "xfail" not in marks, marks


def test_what_the_cases_share_is_sound(shared: Shared, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """If the base, the adapter or the recipe were invalid, every error above would have the wrong cause."""
    assert main(world.use(shared.adapter)) == 0
    assert main(world.train("--dry-run")) == 0
    assert "trained" in capsys.readouterr().out
