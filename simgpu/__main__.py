"""``python -m simgpu`` is the command line."""

import sys

from simgpu.cli import main

sys.exit(main())
