"""`python -m truenorm`: the command, where its script is on no path."""

from __future__ import annotations

import sys

from ._tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
