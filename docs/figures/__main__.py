"""Draw the pictures of the documentation: ``python docs/figures [name ...]`` writes them beside the pages that show them."""

from __future__ import annotations

import sys

from sketch import pictures, render

if __name__ == "__main__":
    for name, path in pictures().items():
        if not sys.argv[1:] or name in sys.argv[1:]:
            render(name, path)
            print(path)
