"""The list of notebooks, notebooks/registry.toml: read, validated, and compared with the files
beside it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

DEFAULT_REGISTRY = Path(__file__).resolve().parents[1] / "notebooks" / "registry.toml"


class RegistryError(ValueError):
    """registry.toml and the notebooks beside it disagree, or the file itself is not valid."""


class NotebookEntry(BaseModel):
    """One notebook as registry.toml describes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Annotated[str, Field(pattern=r"^\d\d_[a-z0-9_]+\.ipynb$")]
    title: Annotated[str, Field(min_length=1)]
    tier: Literal["core", "extra"]
    hardware: Annotated[str, Field(min_length=1)]
    timeout_seconds: Annotated[int, Field(gt=0)]
    minutes: Annotated[float, Field(gt=0)]

    @property
    def number(self) -> str:
        """The two digits the file name starts with, such as "01"."""
        return self.file[:2]

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
    """All notebooks in the order they are read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    notebook: list[NotebookEntry] = []

    def select(self, numbers: list[str] | None = None) -> list[NotebookEntry]:
        """The notebooks with these numbers ("1" and "01" are the same); all when `numbers` is empty
        or None.

        Raises RegistryError for a number that is not there, naming those that are.
        """
        if not numbers:
            return list(self.notebook)
        wanted = {number.zfill(2) for number in numbers}
        unknown = sorted(wanted - {entry.number for entry in self.notebook})
        if unknown:
            existing = ", ".join(entry.number for entry in self.notebook) or "none"
            raise RegistryError(
                f"no notebook has the number {', '.join(unknown)}; the registry has {existing}. "
                "Choose among those, for example NOTEBOOKS=01"
            )
        return [entry for entry in self.notebook if entry.number in wanted]


def load_registry(path: Path | str = DEFAULT_REGISTRY) -> Registry:
    """Read and validate a registry, and check that the *.ipynb files beside it are those it lists,
    in order.

    Raises RegistryError, naming the file and what to change.
    """
    path = Path(path)
    try:
        registry = Registry.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
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
