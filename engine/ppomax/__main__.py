"""`python -m ppomax` is the `ppomax` command."""

import sys

from ppomax.cli import main

sys.exit(main())
