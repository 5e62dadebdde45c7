"""`python -m bench.data`."""

import sys

from bench.data.run import main

if __name__ == "__main__":
    sys.exit(main())
