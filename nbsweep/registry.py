"""The list of notebooks, registry.toml: found, read, validated, and compared with the files beside
it."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from .parameters import ParsedNotebook, parse_notebook
from .provenance import source_hash
from .tomlfile import read_toml
from .words import whole_characters

REGISTRY_VARIABLE = "NBSWEEP_REGISTRY"
FILE = "registry.toml"


class RegistryError(ValueError):
    """registry.toml and the notebooks beside it disagree, or the file itself is not valid."""


class NotebookEntry(BaseModel):
    """One notebook as registry.toml describes it.

    Attributes:
        hardware: what it needs, such as "any" or "simulated or 2+ GPUs".
        timeout_seconds: the whole notebook is stopped after this long.
        minutes: expected on a laptop; the longest begin first.
        reading_minutes: for who reads every word; None where nobody counted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    title: Annotated[str, Field(min_length=1)]
    tier: Literal["core", "extra"]
    hardware: Annotated[str, Field(min_length=1)]
    timeout_seconds: Annotated[int, Field(gt=0)]
    minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    reading_minutes: Annotated[int, Field(gt=0)] | None = None

    @property
    def number(self) -> str:
        """The digits the file name starts with, such as "01"; its stem where it has none."""
        found = re.match(r"\d+(?=_)", self.file)
        return found[0] if found else self.file.removesuffix(".ipynb")

    @property
    def gpus(self) -> int:
        """How many GPUs it works on at least, by ``hardware``; 0 where that names none."""
        found = re.search(r"(\d+)\+? GPU", self.hardware)
        return int(found[1]) if found else 0

    @property
    def needs_gpus(self) -> bool:
        """Whether it works only where GPUs are."""
        return self.gpus > 0 and not re.search(r"simulated|any", self.hardware)


class Registry(BaseModel):
    """All notebooks in the order they are read, and what their runs depend on.

    Attributes:
        packages: those whose source decides a run's identity, beside this one.
        libraries: those whose versions an outcome has.
        environment: variables that every kernel is given.
        folder: where the notebooks are.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    notebook: list[NotebookEntry] = []
    packages: list[str] = ["nbsweep"]
    libraries: list[str] = []
    environment: dict[str, str] = {}
    folder: Path = Path()


@dataclass(frozen=True)
class Notebook:
    """A notebook's file, with what its registry says of it."""

    path: Path
    entry: NotebookEntry
    registry: Registry

    @cached_property
    def parsed(self) -> ParsedNotebook:
        """Its parameters and code. Raises ParameterError."""
        return parse_notebook(self.path)

    @cached_property
    def source(self) -> str:
        """``source_hash`` of the file. Raises OSError, ValueError."""
        return source_hash(self.path.read_bytes())


def find_registry(given: Path | str | None = None) -> Path:
    """The registry that was given, or that NBSWEEP_REGISTRY names; else notebooks/registry.toml in
    this folder, in one above it, or beside this package.

    Raises RegistryError where there is none.
    """
    if given or (given := os.environ.get(REGISTRY_VARIABLE)):
        return Path(given).resolve()
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[1]):
        if (path := folder / "notebooks" / FILE).is_file():
            return path
    raise RegistryError(
        f"there is no notebooks/{FILE} in this folder or above it; go to a clone of the repository,"
        f" name the file with --registry or {REGISTRY_VARIABLE}, or name a notebook's file"
    )


def find_notebook(name: str, base: Path, registry: Registry) -> Notebook:
    """A notebook by its number or file name in the registry, or by its path.

    Args:
        name: such as "01", "1", "01_first.ipynb" or "targets/first.ipynb"; what a path's own
            registry, beside it, says of it counts.
        base: the folder that a path is relative to.

    Raises:
        RegistryError: there is no such notebook, or its registry is not right.
    """
    for entry in registry.notebook:
        if name in (entry.file, entry.number) or name.zfill(2) == entry.number:
            return Notebook(registry.folder / entry.file, entry, registry)
    path = (base / name).resolve()
    if name.endswith(".ipynb") and path.is_file():
        if path.name != whole_characters(path.name):
            raise RegistryError(f"{path.name!r} has half of a character in its name; rename it")
        own = Registry(folder=path.parent)
        if (path.parent / FILE).is_file():
            own = load_registry(path.parent / FILE)
        unregistered = NotebookEntry(
            file=path.name, title=path.stem, tier="extra", hardware="any", timeout_seconds=300,
            minutes=1,
        )  # fmt: skip
        listed = (entry for entry in own.notebook if entry.file == path.name)
        return Notebook(path, next(listed, unregistered), own)
    close = difflib.get_close_matches(name, [entry.file for entry in registry.notebook], n=1)
    guess = f"did you mean {close[0]}? The" if close else "the"
    numbers = ", ".join(entry.number for entry in registry.notebook) or "none"
    raise RegistryError(f"no notebook {name!r} is registered; {guess} registry has {numbers}")


def load_registry(path: Path | str | None = None) -> Registry:
    """Read and validate a registry, by default ``find_registry``'s, and check that the *.ipynb
    files beside it are those it lists, in order.

    Raises RegistryError, naming the file and what to change.
    """
    path = find_registry(path)
    try:
        registry = read_toml(path, Registry, NotebookEntry, "the list of notebooks")
    except ValueError as error:
        raise RegistryError(str(error)) from None
    listed = [entry.file for entry in registry.notebook]
    present = {file.name for file in path.parent.glob("*.ipynb")}
    numbers = [entry.number for entry in registry.notebook]
    if unlisted := sorted(present - set(listed)):
        problem = f"does not list {', '.join(unlisted)}; expected every notebook beside it. "
        problem += "Add a [[notebook]] entry"
    elif absent := [file for file in listed if file not in present]:
        problem = f"lists {', '.join(absent)}, which does not exist beside it. "
        problem += "Restore the file or remove the entry"
    elif numbers != sorted(set(numbers)):
        problem = f"has the numbers {', '.join(numbers)}; expected each once and ascending. "
        problem += "Reorder the entries"
    else:
        return registry.model_copy(update={"folder": path.parent})
    raise RegistryError(f"{path} {problem}")
