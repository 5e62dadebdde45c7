"""`python -m bench.gpu`."""

import signal

from bench.gpu.run import main

for sign in (signal.SIGTERM, signal.SIGHUP):  # a step runs in its own process group and would survive
    signal.signal(sign, signal.default_int_handler)
raise SystemExit(main())
