"""`python -m shadowvol` is the command `shadowvol`, for processes that start others with their own interpreter."""

import sys

from shadowvol.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
