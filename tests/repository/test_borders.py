"""The borders between the three packages: who may import whom, and nothing private across them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("simgpu", "glm4v_nb", "nbsweep")
FILES = sorted(
    path for room in (*ROOMS, "benchmarks", "tools") for path in (ROOT / room).rglob("*.py")
)


def private_imports(source: str, own: str) -> list[str]:
    """Private names and modules of the other packages that a module of package ``own`` imports."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            room, *parts = name.split(".")
            if room in ROOMS and room != own and any(part.startswith("_") for part in parts):
                found.append(name)
    return found


def test_a_private_import_is_noticed():
    source = "from simgpu.rig import Rig, _choose\nimport simgpu._inner\nfrom .rig import _choose"
    assert private_imports(source, "glm4v_nb") == ["simgpu.rig._choose", "simgpu._inner"]
    assert private_imports(source, "simgpu") == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_private_is_imported_from_another_package(path):
    own = path.relative_to(ROOT).parts[0]
    assert private_imports(path.read_text(encoding="utf-8"), own) == []


def test_the_contracts_between_the_packages_are_kept():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
