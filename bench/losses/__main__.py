"""`python -m bench.losses`."""

from bench.losses.run import main

raise SystemExit(main())
