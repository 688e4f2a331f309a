"""Write docs/parity.md from the measured cells."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from tests.parity.cells import COLUMNS, TOLERANCE, Cells
from tests.parity.recorded import VERSIONS
from tests.parity.sizes import FAMILIES, TITLES, described
from tests.parity.table import NAMES, ROWS

Measured = Mapping[tuple[str, str], Cells]

HEADINGS: Mapping[str, tuple[str, str]] = {
    "forward": ("Forward", "Relative L2 error of the logits."),
    "gradients": (
        "Gradients",
        "Relative L2 error of the gradient of each trained tensor, the worst of them; one whose gradient is below a tenth of the largest "
        "is measured against that tenth.",
    ),
    "generate": (
        "Generate",
        "Eight tokens, greedily, with a cache: relative L2 error of the logits of all steps where every token is the same; otherwise the "
        "share of tokens that differ.",
    ),
    "files": (
        "File round trip",
        "Relative L2 error of the logits after our tensors went through the other program's files and were loaded here again, into a fresh "
        "base. °: written and read by Byway alone, which must be exact.",
    ),
}

_INTRODUCTION = """# Parity

Does each method compute what others compute? Here every method runs on eight architectures beside code that is not Byway's, with the same
tensors, and both are compared in numbers. The page is written by

```
python docs/parity.py
```

on one processor core in float32. `make test` measures a sample of the cells again, `make test-full` all of them; both fail if a cell is out
of tolerance.
"equal" is bit for bit. Where a cell consists of several comparisons (see *Against what*), the worst is shown.
"""


def page(found: Measured, mutants: Measured, seed: int) -> str:
    """The whole page."""
    parts = [_INTRODUCTION, _tolerances()]
    for column in COLUMNS:
        title, text = HEADINGS[column]
        rows = [[f"`{m}`", *(found[m, f][column].text(column) for f in FAMILIES)] for m in NAMES]
        parts.append(f"## {title}\n\n{text}\n\n{_table(['method', *TITLES.values()], rows)}")
    parts += [_reasons(found), _references(), _mutants(found, mutants), _models(seed)]
    return "\n".join(parts)


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *rows))


def _tolerances() -> str:
    shown = ", ".join(f"{HEADINGS[column][0].lower()} {TOLERANCE[column]:.0e}" for column in COLUMNS)
    return f"Tolerances, the same for all methods: {shown}; of the generated tokens none may differ. A cell out of tolerance is **bold**.\n"


def _reasons(found: Measured) -> str:
    where: dict[str, list[str]] = {}
    for (method, family), cells in found.items():
        for column, cell in cells.items():
            if cell.error is None:
                where.setdefault(cell.reason, []).append(f"`{method}` on {TITLES[family]}" if column == "forward" else "")
    lines = []
    for reason, places in where.items():
        named = ", ".join(place for place in places if place)
        lines.append(f"* –: {reason}{f': {named}' if named else ''}.")
    return "## Where there is no number\n\n" + "\n".join(lines) + "\n"


def _references() -> str:
    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    shown = ", ".join(f"{name} {number}" for name, number in packages.items())
    recorded = f"adapters {VERSIONS['adapters']} (recorded once with transformers {VERSIONS['transformers']})"
    rows = [[f"`{name}`", ROWS[name].reference] for name in NAMES]
    return f"## Against what\n\nVersions: {shown}, {recorded}.\n\n{_table(['method', 'reference'], rows)}"


def _mutants(found: Measured, mutants: Measured) -> str:
    rows = []
    for method in NAMES:
        row = [f"`{method}`"]
        for column in COLUMNS:
            families = [f for f in FAMILIES if found[method, f][column].error is not None]
            green = sum(found[method, f][column].good(column) for f in families)
            red = sum(not mutants[method, f][column].good(column) for f in families)
            row.append(f"{red} of {green}")
        rows.append(row)
    return (
        "## With a wrong scale\n\nA comparison that nothing can fail proves nothing. Here what each side path does (what it adds, scales, "
        "puts in front, or answers) is multiplied by 1.5, after the twin was made: so many of the cells that are good above turn bad, on "
        f"all architectures and in each of a cell's comparisons.\n\n{_table(['method', *(HEADINGS[c][0].lower() for c in COLUMNS)], rows)}"
    )


def _models(seed: int) -> str:
    lines = [f"* {TITLES[family]}: {sizes}" for family, sizes in described(seed).items()]
    return (
        f"## The models\n\nRandom small models of transformers, sizes and weights from the seed {seed}; `BYWAY_TEST_SEED` draws others in "
        "the tests. Every trained tensor is filled with random numbers.\n\n" + "\n".join(lines) + "\n"
    )
