"""`python -m bench.theory`."""

from bench.theory.run import main

raise SystemExit(main())
