"""The command ``cmc-server``, also ``python -m cmc_server``."""

from __future__ import annotations

import sys

from cmc_server.cli import main

if __name__ == "__main__":
    sys.exit(main())
