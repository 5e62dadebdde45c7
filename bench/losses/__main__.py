"""`python -m bench.losses`."""

import sys

from bench.losses.run import main

if __name__ == "__main__":
    sys.exit(main())
