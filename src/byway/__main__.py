"""Run the command line: ``python -m byway``."""

import os
import sys

# python -m puts the current directory first, where a file that somebody sent could stand in for any module
if sys.path and sys.path[0] in ("", os.getcwd()) and not sys.flags.safe_path:
    del sys.path[0]

from byway.cli import main

sys.exit(main())
