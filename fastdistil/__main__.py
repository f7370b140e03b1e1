"""`python -m fastdistil`: the command line."""

import sys

from fastdistil.cli import main

if __name__ == "__main__":
    sys.exit(main())
