"""`python -m bench.reproduction`."""

from bench.reproduction.run import main

raise SystemExit(main())
