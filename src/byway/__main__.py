"""Run the command line: ``python -m byway``."""

import sys

from byway.cli import main

sys.exit(main())
