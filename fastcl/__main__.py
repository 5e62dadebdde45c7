"""`python -m fastcl`: the command line."""

import sys

from fastcl.cli import main

sys.exit(main())
