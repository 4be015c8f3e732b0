"""The command line from inside the package; it lives in ``glm4v_nb_cli``, where --help imports no torch."""

import sys

from glm4v_nb_cli import app, main

__all__ = ["app", "main"]

if __name__ == "__main__":
    sys.exit(main())
