"""A test's file run as a program, where Triton compiles: in the tests it may interpret."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def compiled_output(file: str, card: int, cache: Path) -> str:
    """What ``file`` prints for a compute capability; what it compiles goes to ``cache`` alone."""
    pytest.importorskip("triton", reason="Triton is not installed: no kernels to compile")
    # The file imports this module, too.
    folders = str(Path(__file__).parent), os.environ.get("PYTHONPATH")
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    done = subprocess.run(
        [sys.executable, file, str(card)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
