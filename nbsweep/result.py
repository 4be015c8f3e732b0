"""How one notebook went, and what it ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pynvml

PACKAGES = ("torch", "transformers", "accelerate", "glm4v-nb")


@dataclass
class NotebookResult:
    """How one notebook went.

    Attributes:
        cells: code cells with something in them.
        failed_cell: counts them from 1, as the [n] beside a freshly run cell does.
        error: the last line of the traceback, or what else ended it.
        ending: what ended it where that was no error of a cell.
    """

    status: Literal["done", "failed"] = "failed"
    seconds: float = 0.0
    cells: int = 0
    failed_cell: int | None = None
    error: str | None = None
    traceback: str | None = None
    ending: Literal["timeout", "killed"] | None = None


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on; "not installed" where one is
    missing."""
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


def gpu_names() -> list[str]:
    """The machine's GPUs as NVML names them, with the driver's version; none without an NVIDIA
    driver."""
    try:
        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        names = [f"{pynvml.nvmlDeviceGetName(handle)}, driver {driver}" for handle in handles]
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return []
    return names


def commit_of(folder: Path) -> str:
    """The commit of the repository that holds a folder's files, "-dirty" after it if they differ;
    "" outside one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=30, check=True
        ).stdout.strip()

    try:
        # A package installed inside somebody else's repository is not part of it.
        if not git("ls-files", "."):
            return ""
        return git("describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return ""


def without_private_paths(text: str, repository: Path) -> str:
    """`text` with the repository's and the home folder shortened, so that a report can be shown
    around."""
    text = text.replace(f"{repository}{os.sep}", "")
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text
