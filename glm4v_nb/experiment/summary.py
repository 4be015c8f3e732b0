"""What a run of the suite writes down about itself: summary.json, whole at every moment."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections import Counter
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from .files import write_whole

PACKAGES = ("torch", "transformers", "accelerate", "glm4v-nb")


class NotebookResult(BaseModel):
    """How one notebook went.

    failed_cell counts code cells from 1, as the [n] beside a freshly run cell does. `error` is the last line
    of the traceback or the reason it did not run; `ending` says what ended it where that was no error of a cell;
    `executed` and `rendered` name files in the run's folder.
    """

    file: str
    title: str
    status: Literal["done", "failed", "not run"]
    seconds: float = 0.0
    cells: int = 0
    failed_cell: int | None = None
    error: str | None = None
    traceback: str | None = None
    ending: Literal["timeout", "killed"] | None = None
    executed: str | None = None
    rendered: str | None = None


class RunSummary(BaseModel):
    """One run of the suite."""

    started: str
    seconds: float = 0.0
    versions: dict[str, str]
    platform: str
    notebooks: list[NotebookResult] = []

    def count(self, status: str) -> int:
        """How many notebooks ended with this status."""
        return Counter(result.status for result in self.notebooks)[status]

    @property
    def exit_code(self) -> int:
        """0 when every notebook that was to run is done, 130 when the user interrupted, else 1."""
        if any(result.error == "interrupted" for result in self.notebooks):
            return 130
        return 0 if self.count("done") == len(self.notebooks) else 1

    def write(self, directory: Path) -> Path:
        """Write summary.json into `directory` so that a reader never sees half a file; returns its path."""
        path = directory / "summary.json"
        write_whole(path, self.model_dump_json(indent=2) + "\n")
        return path


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on; "not installed" where one is missing."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        try:
            versions[package.replace("-", "_")] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package.replace("-", "_")] = "not installed"
    return versions


def platform_description() -> str:
    """Operating system and processor kind, without the machine's or the user's name."""
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def without_private_paths(text: str, repository: Path) -> str:
    """`text` with the repository's and the home folder shortened, so that a report can be shown around."""
    text = text.replace(f"{repository}{os.sep}", "")
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text
