"""`python -m bench.similarity`."""

import sys

from bench.similarity.run import main

if __name__ == "__main__":
    sys.exit(main())
