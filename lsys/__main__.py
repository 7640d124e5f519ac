"""`lsys` and `python -m lsys`."""

import sys

from lsys.cli import main

if __name__ == "__main__":
    sys.exit(main())
