"""Measure every cell of the parity table and write docs/parity.md: ``python docs/parity.py``. Exit code 1 if a cell is out of tolerance."""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "parity.md"


def main() -> int:
    """Measure, write, and say what is wrong."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, str(ROOT))
    import torch
    from tests.parity.page import page
    from tests.parity.table import PAIRS, SEED, cells, mutant
    from transformers import logging

    from byway.core.disk.files import atomic_write_text

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    start, found, mutants, wrong = time.perf_counter(), {}, {}, []
    for method, family in PAIRS:
        found[method, family] = cells(method, family)
        mutants[method, family] = mutant(method, family)
        for column, cell in found[method, family].items():
            if cell.error is not None and not cell.good(column):
                wrong.append(f"{method} on {family}: {column} {cell.error:.1e}")
            if cell.error is not None and mutants[method, family][column].good(column):
                wrong.append(f"{method} on {family}: {column} does not notice a wrong scale")
        print(f"{method} on {family}: {', '.join(cell.text(column) for column, cell in found[method, family].items())}", file=sys.stderr)
    atomic_write_text(PAGE, page(found, mutants, SEED))
    print(f"{PAGE.name}: {len(PAIRS)} pairs in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    print("\n".join(wrong) or "every cell within tolerance, every wrong scale noticed", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
