"""`python -m bench.gpu`."""

import signal
import sys

from bench.gpu.run import main

if __name__ == "__main__":
    for sign in (signal.SIGTERM, signal.SIGHUP):  # a step runs in its own process group and would survive
        signal.signal(sign, signal.default_int_handler)
    sys.exit(main())
