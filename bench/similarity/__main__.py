"""`python -m bench.similarity`."""

from bench.similarity.run import main

raise SystemExit(main())
