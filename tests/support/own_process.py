"""A test's file run as a program, where Triton compiles: in the tests it may interpret."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def compiled_output(file: str, cards: list[int], cache: Path) -> dict[int, dict]:
    """What ``file`` prints, a line of JSON for each of these compute capabilities, in one process;
    what it compiles goes to ``cache`` alone."""
    pytest.importorskip("triton", reason="Triton is not installed: no kernels to compile")
    # The file imports this module, too.
    folders = str(Path(__file__).parent), os.environ.get("PYTHONPATH")
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    done = subprocess.run(
        [sys.executable, file, *map(str, cards)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(cards, map(json.loads, done.stdout.splitlines()), strict=True))
