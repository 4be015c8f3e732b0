"""Do the stored notebooks keep the rules? `python tools/notebook_rules [NOTEBOOK ...]` says where
not.

With --execute, which is `make validate`, nbval then runs every cell and compares those marked for
it. Exit codes: 0 all is well, 1 a rule is broken or a cell failed, 2 wrong use.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from nbsweep.registry import FILE, RegistryError, find_notebook, load_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from notebook_rules.stored import Finding, check_notebook

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (ROOT / "notebooks", ROOT / "sweeps" / "targets")


def validate(notebooks: Sequence[str] = ()) -> tuple[list[Path], list[Finding]]:
    """Check notebooks without running them; returns which, and what was found.

    Args:
        notebooks: numbers as in the registry, or paths of .ipynb files, which no registry need
            list; all of the lessons and of what the sweeps run when empty.

    Raises:
        RegistryError: a registry is not right, or there is no such notebook.
        OSError: a notebook cannot be read.
        RuntimeError: nb-clean is not installed.
    """
    lessons, targets = (load_registry(folder / FILE) for folder in FOLDERS)
    if not notebooks:
        notebooks = [entry.number for entry in lessons.notebook]
        notebooks += [str(targets.folder / entry.file) for entry in targets.notebook]
    found = {}
    for name in notebooks:
        if name.endswith(".ipynb") and not Path(name).is_file():
            raise RegistryError(f"there is no file {name}; name a notebook's number, or its path")
        notebook = find_notebook(name, Path.cwd(), lessons)
        listed = notebook.entry in notebook.registry.notebook
        found[notebook.path] = notebook.entry if listed else None
    findings = [finding for path, entry in found.items() for finding in check_notebook(path, entry)]
    return list(found), findings


def execute(paths: Sequence[Path], workers: int = 2) -> int:
    """Run notebooks of this repository with nbval, as its pyproject.toml says; returns pytest's
    exit code.

    Raises:
        RegistryError: a notebook lies elsewhere, where neither that file nor conftest.py holds.
    """
    if strangers := [path.name for path in paths if path.parent not in FOLDERS]:
        raise RegistryError(
            f"{', '.join(strangers)} is not in notebooks/ or sweeps/targets/, and --execute runs"
            " only what is; move it there, or leave out --execute"
        )
    sys.stdout.flush()  # before what pytest prints
    command = [sys.executable, "-m", "pytest", "-n", str(min(workers, len(paths)))]
    command += ["--dist", "loadfile", *(str(path.relative_to(ROOT)) for path in paths)]
    return subprocess.call(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"})


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python tools/notebook_rules", description="Check the stored notebooks."
    )
    parser.add_argument(
        "notebooks",
        nargs="*",
        metavar="NOTEBOOK",
        help="a number such as 01, or a file (default: all)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--execute", action="store_true", help="then run them, if no rule is broken"
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="with --execute: notebooks at a time (default: 2)"
    )
    options = parser.parse_args(arguments)
    if options.json and options.execute:
        parser.error("--json is for the rules; leave out --execute")
    try:
        paths, findings = validate(options.notebooks)
        print_findings(paths, findings, options.json)
        failed = bool(findings) or (options.execute and execute(paths, options.workers) != 0)
    except (RegistryError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, RegistryError) else 1
    return 1 if failed else 0


def print_findings(paths: Sequence[Path], findings: Sequence[Finding], as_json: bool = False):
    """A line for each finding and a last one that counts them; or one JSON object."""
    if as_json:
        checked = [path.name for path in paths]
        print(
            json.dumps(
                {"notebooks": checked, "findings": [each.to_dict() for each in findings]}, indent=2
            )
        )
        return
    for finding in findings:
        print(finding)
    print(f"{len(paths)} notebooks, {len(findings)} findings")


if __name__ == "__main__":
    sys.exit(main())
