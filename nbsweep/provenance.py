"""What a run depends on and what it ran on: hashes of sources, versions, GPUs; and texts without
the paths of this machine."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat

DISTRIBUTION = "glm4v-nb"


def digest(text: str) -> str:
    """A short hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def source_hash(notebook: bytes) -> str:
    """Hash of a notebook's cells: kinds, sources and tags, without outputs and execution counts.

    Raises:
        ValueError: it is no notebook.
    """
    try:
        cells = nbformat.reads(notebook.decode(), as_version=4).cells
    except Exception as error:  # nbformat has no base class for what it may find
        raise ValueError(f"not a notebook: {error}") from None
    return digest(
        json.dumps([[cell.cell_type, cell.source, cell.metadata.get("tags", [])] for cell in cells])
    )


def package_folder(package: str) -> Path:
    """Where a package's source is, found without importing it.

    Raises:
        ValueError: there is none.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the package {package} is not installed; install it, or name another")
    return Path(list(spec.submodule_search_locations)[0])


def package_hash(packages: Sequence[str]) -> str:
    """Hash of packages' Python files and data as they are now, so that work done with other code
    counts as other work."""
    found = hashlib.sha256()
    for package in sorted(packages):
        folder = package_folder(package)
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                found.update(str(path.relative_to(folder.parent)).encode())
                found.update(path.read_bytes())
    return found.hexdigest()[:16]


def checkpoint_sizes(parameters: Mapping, folder: Path) -> dict[str, int]:
    """Names and sizes in bytes of the files of a checkpoint in a directory, which copies of it
    share; else none."""
    return {path.name: path.stat().st_size for path in _checkpoint_files(parameters, folder) or ()}


def checkpoint_fingerprint(parameters: Mapping, folder: Path) -> str:
    """Of a checkpoint in a directory: names, sizes and times of its files; "" for one on the
    hub."""
    files = _checkpoint_files(parameters, folder)
    found = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files or ()]
    return "" if files is None else digest(json.dumps(found))


def _checkpoint_files(parameters: Mapping, folder: Path) -> list[Path] | None:
    name = parameters.get("checkpoint")
    if not isinstance(name, str) or not (folder / name).is_dir():
        return None
    return sorted(path for path in (folder / name).iterdir() if path.is_file())


def installed_versions(libraries: Sequence[str]) -> dict[str, str]:
    """Versions of Python, of these libraries and of this distribution; "not installed" where one is
    missing."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for library in (*libraries, DISTRIBUTION):
        try:
            versions[library.replace("-", "_")] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library.replace("-", "_")] = "not installed"
    return versions


def platform_description() -> str:
    """Operating system and processor kind, without the machine's or the user's name."""
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def gpu_names() -> list[str] | None:
    """The machine's GPUs as NVML names them, with the driver's version; none without an NVIDIA
    driver, None where nvidia-ml-py is not installed."""
    try:
        import pynvml
    except ImportError:
        return None
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


def without_private_paths(text: str, folders: Sequence[Path] = ()) -> str:
    """`text` without what tells of this machine's folders, so that a report can be shown around.

    ``folders``, such as the repository, are left out; Python's own, the temporary one and the home
    folder are given short names.
    """
    paths = sysconfig.get_paths()
    pythons = {sys.prefix, sys.base_prefix} - {"/usr", "/usr/local"}
    names = dict.fromkeys(map(str, folders), "") | dict.fromkeys(pythons, "python/")
    names |= {paths["purelib"]: "site-packages/", paths["stdlib"]: "python/"}
    names |= {tempfile.gettempdir(): "tmp/", str(Path.home()): "~/"}
    for folder in sorted(filter(lambda name: len(name) > 1, names), key=len, reverse=True):
        inside = rf"(?<![\w.~-]){re.escape(folder)}(?:/|(?![\w.-]))"
        text = re.sub(inside, lambda found, name=names[folder]: name, text)
    return text
