"""The list of notebooks, registry.toml: found, read, validated, and compared with the files beside
it."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

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
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+\.ipynb$")]
    title: Annotated[str, Field(min_length=1)]
    tier: Literal["core", "extra"]
    hardware: Annotated[str, Field(min_length=1)]
    timeout_seconds: Annotated[int, Field(gt=0)]
    minutes: Annotated[float, Field(gt=0)]

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

    def select(self, numbers: Sequence[str] | None = None) -> list[NotebookEntry]:
        """The notebooks with these numbers ("1" and "01" are the same); all when `numbers` is empty
        or None.

        Raises RegistryError for a number that is not there, naming those that are.
        """
        if not numbers:
            return list(self.notebook)
        wanted = {number.zfill(2) for number in numbers}
        unknown = sorted(wanted - {entry.number for entry in self.notebook})
        if unknown:
            raise RegistryError(
                f"no notebook has the number {', '.join(unknown)}; the registry has"
                f" {self.numbers}. Choose among those, for example NOTEBOOKS=01"
            )
        return [entry for entry in self.notebook if entry.number in wanted]

    @property
    def numbers(self) -> str:
        """The notebooks' numbers as a text."""
        return ", ".join(entry.number for entry in self.notebook) or "none"


@dataclass(frozen=True)
class Notebook:
    """A notebook's file, with what its registry says of it."""

    path: Path
    entry: NotebookEntry
    registry: Registry


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
        name: such as "01", "01_first.ipynb" or "targets/first.ipynb"; what a path's own registry,
            beside it, says of it counts.
        base: the folder that a path is relative to.

    Raises:
        RegistryError: there is no such notebook, or its registry is not right.
    """
    for entry in registry.notebook:
        if name in (entry.file, entry.number) or name.zfill(2) == entry.number:
            return Notebook(registry.folder / entry.file, entry, registry)
    path = (base / name).resolve()
    if name.endswith(".ipynb") and path.is_file():
        own = Registry(folder=path.parent)
        if (path.parent / FILE).is_file():
            own = load_registry(path.parent / FILE)
        entry = next((entry for entry in own.notebook if entry.file == path.name), None)
        return Notebook(path, entry or _unregistered(path), own)
    close = difflib.get_close_matches(name, [entry.file for entry in registry.notebook], n=1)
    guess = f"did you mean {close[0]}? The" if close else "the"
    raise RegistryError(
        f"no notebook {name!r} is registered; {guess} registry has {registry.numbers}"
    )


def _unregistered(path: Path) -> NotebookEntry:
    return NotebookEntry.model_construct(
        file=path.name, title=path.stem, tier="extra", hardware="any", timeout_seconds=300,
        minutes=1.0,
    )  # fmt: skip


def load_registry(path: Path | str | None = None) -> Registry:
    """Read and validate a registry, by default ``find_registry``'s, and check that the *.ipynb
    files beside it are those it lists, in order.

    Raises RegistryError, naming the file and what to change.
    """
    path = find_registry(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        registry = Registry.model_validate(content | {"folder": path.parent})
    except FileNotFoundError:
        raise RegistryError(
            f"{path} does not exist; expected the list of notebooks. Restore it from the repository"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RegistryError(f"{path} is not valid TOML: {error}. Correct that line") from None
    except ValidationError as error:
        raise RegistryError(f"{path}: {_first_problem(error)}") from None
    _check_against_files(registry, path)
    return registry


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = ", ".join(NotebookEntry.model_fields)
        return f"unknown key {where}; a [[notebook]] has {known}. Correct the spelling or remove it"
    return f"{where}: {problem['msg']} (found {problem['input']!r}). Correct this entry"


def _check_against_files(registry: Registry, path: Path) -> None:
    listed = [entry.file for entry in registry.notebook]
    present = {file.name for file in path.parent.glob("*.ipynb")}
    if unlisted := sorted(present - set(listed)):
        raise RegistryError(
            f"{path} does not list {', '.join(unlisted)}; expected every notebook beside it. "
            "Add a [[notebook]] entry"
        )
    if absent := [file for file in listed if file not in present]:
        raise RegistryError(
            f"{path} lists {', '.join(absent)}, which does not exist beside it. "
            "Restore the file or remove the entry"
        )
    numbers = [entry.number for entry in registry.notebook]
    if numbers != sorted(set(numbers)):
        raise RegistryError(
            f"{path} has the numbers {', '.join(numbers)}; expected each once and ascending. "
            "Reorder the entries"
        )
