"""``python -m nbsweep`` is the command line ``nbsweep``."""

import sys

from nbsweep.cli import main

sys.exit(main())
