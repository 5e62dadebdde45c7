"""`python -m fastcl`: the command line."""

import sys

from fastcl.cli.main import main

sys.exit(main())
