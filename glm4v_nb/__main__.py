"""``python -m glm4v_nb`` is the command line ``glm4v-nb``."""

import sys

from glm4v_nb.cli import main

sys.exit(main())
