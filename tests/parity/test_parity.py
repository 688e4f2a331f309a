"""Every cell of the parity table is within tolerance, a wrong scale makes it fail, and the page lists every cell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from byway import methods
from tests import tiny
from tests.methods.cases import REFUSED
from tests.parity.cells import COLUMNS, ENCODES, GENERATING
from tests.parity.page import HEADINGS
from tests.parity.sizes import FAMILIES, TITLES
from tests.parity.table import NAMES, PAIRS, ROWS, cells, mutant

PAGE = Path(__file__).parent.parent.parent / "docs" / "parity.md"
pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of other programs


def expected(method: str, family: str, column: str) -> bool:
    """True if the cell has a number."""
    return (method, family) not in REFUSED and (column != "generate" or family in GENERATING)


@pytest.mark.covering_sample(times=2)
@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_every_cell_is_within_tolerance(method: str, family: str, seed: int) -> None:
    found = cells(method, family, seed)
    assert tuple(found) == COLUMNS
    for column, cell in found.items():
        if expected(method, family, column):
            assert cell.good(column), f"{column}: {cell.error}"
        else:
            assert cell.error is None
            assert cell.reason == ENCODES or (method, family) in REFUSED


@pytest.mark.covering_sample
@pytest.mark.parametrize(("method", "family"), [pair for pair in PAIRS if pair not in REFUSED])
def test_a_wrong_scale_turns_every_cell_bad(method: str, family: str, seed: int) -> None:
    found = mutant(method, family, seed)
    blind = [column for column, cell in found.items() if expected(method, family, column) and cell.good(column)]
    assert not blind


def test_every_method_and_every_family_has_its_cells() -> None:
    assert set(ROWS) == set(methods.names())
    assert set(FAMILIES) == set(tiny.FAMILIES)


@pytest.mark.parametrize("column", COLUMNS)
def test_the_page_lists_what_there_is_and_nothing_out_of_tolerance(column: str) -> None:
    found = re.search(rf"^## {HEADINGS[column][0]}\n(.*?)(?=^## )", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert found is not None
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines() if line.startswith("|"))
    assert header == ["method", *TITLES.values()]
    assert [row[0] for row in rows] == [f"`{name}`" for name in NAMES]
    for method, row in zip(NAMES, rows, strict=True):
        for family, text in zip(FAMILIES, row[1:], strict=True):
            pattern = r"(equal|\d(\.\d)?e-\d+)°?" if expected(method, family, column) else "–"
            assert re.fullmatch(pattern, text), f"{method} on {family}: {text}"
