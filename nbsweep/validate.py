"""Do the stored notebooks keep the rules? `python -m nbsweep.validate [NOTEBOOK ...]` says where
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

from .registry import DEFAULT_REGISTRY, RegistryError, load_registry
from .rules import Finding, check_notebook


def validate(
    notebooks: Sequence[str] = (), registry: Path | str = DEFAULT_REGISTRY
) -> tuple[list[Path], list[Finding]]:
    """Check notebooks without running them; returns which, and what was found.

    Args:
        notebooks: numbers as in the registry, or paths of .ipynb files, which the registry need not
            list; all of the registry's when empty.
        registry: the registry.toml to go by.

    Raises:
        RegistryError: the registry is not right, or there is no such notebook.
        OSError: a notebook cannot be read.
        RuntimeError: nb-clean is not installed.
    """
    registry = Path(registry).resolve()
    listed = load_registry(registry)
    entries = {registry.parent / entry.file: entry for entry in listed.notebook}
    named = [Path(name).resolve() for name in notebooks if name.endswith(".ipynb")]
    if absent := [path.name for path in named if not path.is_file()]:
        raise RegistryError(
            f"there is no file {', '.join(absent)}; name a notebook's number, or its path"
        )
    numbers = [name for name in notebooks if not name.endswith(".ipynb")]
    chosen = (
        [registry.parent / entry.file for entry in listed.select(numbers)]
        if numbers or not named
        else []
    )
    paths = list(dict.fromkeys(chosen + named))
    return paths, [finding for path in paths for finding in check_notebook(path, entries.get(path))]


def execute(paths: Sequence[Path], workers: int = 2) -> int:
    """Run notebooks of this repository with nbval, as its pyproject.toml says; returns pytest's
    exit code.

    Raises:
        RegistryError: a notebook lies elsewhere, where neither that file nor conftest.py holds.
    """
    if strangers := [path.name for path in paths if path.parent != DEFAULT_REGISTRY.parent]:
        raise RegistryError(
            f"{', '.join(strangers)} is not in {DEFAULT_REGISTRY.parent.name}/, and --execute runs"
            " only what is; move it there, or leave out --execute"
        )
    sys.stdout.flush()  # before what pytest prints
    repository = DEFAULT_REGISTRY.parents[1]
    names = [str(path.relative_to(repository)) for path in paths]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        str(min(workers, len(paths))),
        "--dist",
        "loadfile",
        *names,
    ]
    return subprocess.call(command, cwd=repository, env=os.environ | {"HF_HUB_OFFLINE": "1"})


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m nbsweep.validate", description="Check the stored notebooks."
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
