"""`python -m bench.data`."""

from bench.data.run import main

raise SystemExit(main())
