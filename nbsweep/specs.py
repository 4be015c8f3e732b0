"""What a run is named by: the notebook's source, its parameters, the package and the checkpoint."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from functools import cache
from pathlib import Path

import nbformat

from .outcome import RunSpec

# The packages whose source a run depends on, found without importing them.
PACKAGES = ("glm4v_nb", "nbsweep", "simgpu")
PACKAGE = Path(importlib.util.find_spec("glm4v_nb").origin).parent


def run_spec(
    notebook: Path,
    title: str,
    defaults: dict,
    given: dict,
    timeout_seconds: float,
    source: str = "",
) -> RunSpec:
    """A run's specification; its ``id`` changes with notebook, parameters, package and checkpoint.

    Not with the libraries, the machine and its GPUs: the outcome has those.

    Args:
        notebook: the notebook's path.
        defaults: all its parameters, as the notebook has them.
        given: those that are set otherwise.
        source: the notebook's ``source_hash`` where it is known already, as it is for the second
            run of one notebook.
    """
    parameters = defaults | given
    identity = {
        "notebook": notebook.name,
        "source": source or source_hash(notebook),
        "parameters": parameters,
        "package": package_hash(),
        "checkpoint": checkpoint_fingerprint(parameters, notebook.parent),
    }
    return RunSpec(
        id=_hash(json.dumps(identity, sort_keys=True)),
        title=title,
        given=sorted(given),
        version=importlib.metadata.version("glm4v-nb"),
        timeout_seconds=timeout_seconds,
        **identity,
    )


def source_hash(notebook: Path) -> str:
    """Hash of a notebook's cells: kinds, sources and tags, without outputs and execution counts."""
    cells = nbformat.read(notebook, as_version=4).cells
    return _hash(
        json.dumps([[cell.cell_type, cell.source, cell.metadata.get("tags", [])] for cell in cells])
    )


@cache
def package_hash() -> str:
    """Hash of the packages' Python files and data, so that work done with other code counts as
    other work."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        folder = Path(importlib.util.find_spec(package).origin).parent
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(str(path.relative_to(folder.parent)).encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def checkpoint_fingerprint(parameters: dict, folder: Path) -> str:
    """Of a checkpoint in a directory: names, sizes and times of its files; "" for one on the
    hub."""
    files = _checkpoint_files(parameters, folder)
    found = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files or ()]
    return "" if files is None else _hash(json.dumps(found))


def checkpoint_sizes(parameters: dict, folder: Path) -> dict[str, int]:
    """Names and sizes in bytes of the files of a checkpoint in a directory, which copies of it
    share; else none."""
    return {path.name: path.stat().st_size for path in _checkpoint_files(parameters, folder) or ()}


def _checkpoint_files(parameters: dict, folder: Path) -> list[Path] | None:
    name = parameters.get("checkpoint")
    if not isinstance(name, str) or not (folder / name).is_dir():
        return None
    return sorted(path for path in (folder / name).iterdir() if path.is_file())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
