"""Do the stored notebooks keep the rules? `python -m glm4v_nb.experiment.validate [NOTEBOOK ...]` says where not.

Nothing is executed; `make validate` goes on with nbval, which does. Exit codes: 0 no finding, 1 findings, 2 wrong use.
"""

from __future__ import annotations

import argparse
import json
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
        notebooks: numbers as in the registry, or paths of .ipynb files, which the registry need not list; all of the
            registry's when empty.
        registry: the registry.toml to go by.

    Raises:
        RegistryError: the registry is not right, or has no such number.
        OSError: a notebook cannot be read.
        RuntimeError: nb-clean is not installed.
    """
    registry = Path(registry).resolve()
    listed = load_registry(registry)
    entries = {registry.parent / entry.file: entry for entry in listed.notebook}
    named = [Path(name).resolve() for name in notebooks if name.endswith(".ipynb")]
    numbers = [name for name in notebooks if not name.endswith(".ipynb")]
    chosen = (
        [registry.parent / entry.file for entry in listed.select(numbers)] if numbers or not named else []
    )
    paths = list(dict.fromkeys(chosen + named))
    return paths, [finding for path in paths for finding in check_notebook(path, entries.get(path))]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m glm4v_nb.experiment.validate",
        description="Check stored notebooks; nothing is executed.",
    )
    parser.add_argument(
        "notebooks", nargs="*", metavar="NOTEBOOK", help="a number such as 01, or a file (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    try:
        paths, findings = validate(options.notebooks)
    except (RegistryError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_findings(paths, findings, options.json)
    return 1 if findings else 0


def print_findings(paths: Sequence[Path], findings: Sequence[Finding], as_json: bool = False):
    """A line for each finding and a last one that counts them; or one JSON object."""
    if as_json:
        checked = [path.name for path in paths]
        print(json.dumps({"notebooks": checked, "findings": [each.to_dict() for each in findings]}, indent=2))
        return
    for finding in findings:
        print(finding)
    print(f"{len(paths)} notebooks, {len(findings)} findings")


if __name__ == "__main__":
    sys.exit(main())
