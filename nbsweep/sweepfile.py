"""A sweep file: which notebooks run with which parameters. Everything in it is checked before
anything runs."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from .parameters import ParameterError, ParsedNotebook, check_override
from .registry import Notebook, Registry, RegistryError, find_notebook
from .store import Value
from .tomlfile import read_toml

MOST_RUNS = 10_000


class SweepFileError(ValueError):
    """A sweep file is not what it should be; one sentence that names the file and the entry."""


_Values = Annotated[list[Any], Field(min_length=1)]
_Columns = Annotated[dict[str, _Values], Field(min_length=1)]
_Row = Annotated[dict[str, Any], Field(min_length=1)]


class _Run(BaseModel):
    """One of the runs as the file has it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    # "notebook = 1" is as clear as a quoted number.
    notebook: Annotated[
        str, BeforeValidator(lambda given: str(given) if type(given) is int else given)
    ]
    grid: _Columns = {}
    zipped: Annotated[_Columns, Field(alias="zip")] = {}
    listed: Annotated[list[_Row], Field(min_length=1, alias="list")] = []
    fixed: Annotated[_Row, Field(alias="set")] = {}
    timeout_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class _File(BaseModel):
    """A whole sweep file as it stands."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")]
    runs: Annotated[list[_Run], Field(min_length=1)]
    tier: Literal["core", "extra"] | None = None
    hardware: Annotated[str, Field(min_length=1)] | None = None


@dataclass(frozen=True)
class WantedRun:
    """A notebook, and the parameters that a run gives it; the others keep their defaults."""

    notebook: Notebook
    parameters: dict[str, Value]
    timeout_seconds: float


def read_sweep_file(path: Path | str, registry: Registry) -> tuple[str, list[WantedRun]]:
    """Read a sweep file and check all of it, each value against the notebook it is for; returns the
    sweep's name and its runs.

    The runs have the order of the file; within an entry the last name of a grid varies first, then
    zip, then list. A notebook is named by its number, or by its path from the file's folder. An
    entry without a timeout has its notebook's timeout_seconds in the registry.

    Raises:
        SweepFileError: whatever is wrong with the file, two runs that are the same included.
    """
    path = Path(path)
    if path.suffix in (".yaml", ".yml"):
        raise SweepFileError(
            f"{path}: sweep files are TOML now, not YAML; write it as .toml, with [[runs]] and"
            ' below it notebook = "01", grid.count = [1, 2], set.card = "L4"'
        )
    try:
        file = read_toml(path, _File, _Run, "a sweep file", name=path.stem)
    except ValueError as error:
        raise SweepFileError(str(error)) from None
    try:
        entries = list(_entries(file, path.resolve().parent, registry))
        if not entries:
            filters = " and ".join(
                f"{key} {value}" for key in ("tier", "hardware") if (value := getattr(file, key))
            )
            raise SweepFileError(
                f"{filters}: no notebook of the runs is left; change the filter or remove it"
            )
        count = sum(math.prod(map(len, blocks)) for *_, blocks in entries)
        if count > MOST_RUNS:
            raise SweepFileError(
                f"runs: {count:,} runs are planned; expected at most {MOST_RUNS:,}; shorten a list"
            )
        return file.name, _expand(entries)
    except (SweepFileError, ParameterError, RegistryError) as error:
        raise SweepFileError(f"{path}: {error}") from None


# An entry of the file, checked: its place, such as runs[0], its notebook and time limit, and what
# varies independently: a run takes one set of each block.
_Block = list[dict[str, Value]]
_Entry = tuple[str, Notebook, float, list[_Block]]


def _entries(file: _File, folder: Path, registry: Registry) -> Iterator[_Entry]:
    """The entries that the file's filters leave. The others are checked too: they may be wanted
    next time."""
    found: dict[str, Notebook] = {}
    for index, run in enumerate(file.runs):
        place = f"runs[{index}]"
        try:
            notebook = find_notebook(run.notebook, folder, registry)
        except RegistryError as error:
            raise SweepFileError(f"{place}.notebook: {error}") from None
        notebook = found.setdefault(str(notebook.path), notebook)
        blocks = _blocks(run, notebook.parsed, place)
        if file.tier in (None, notebook.entry.tier):
            if (file.hardware or "") in notebook.entry.hardware:
                seconds = run.timeout_seconds or float(notebook.entry.timeout_seconds)
                yield place, notebook, seconds, blocks


def _expand(entries: list[_Entry]) -> list[WantedRun]:
    runs: list[WantedRun] = []
    places: dict[str, str] = {}
    for place, notebook, seconds, blocks in entries:
        for number, choice in enumerate(itertools.product(*blocks), start=1):
            given = {name: value for values in choice for name, value in values.items()}
            run = json.dumps([str(notebook.path), notebook.parsed.parameters | given])
            here = f"{place} (its run {number})"
            if run in places:
                values = ", ".join(f"{name}={value!r}" for name, value in given.items())
                raise SweepFileError(
                    f"{here} repeats {places[run]}: {notebook.path.name} with"
                    f" {values or 'the defaults'}; remove one"
                )
            places[run] = here
            runs.append(WantedRun(notebook, given, seconds))
    return runs


def _blocks(run: _Run, notebook: ParsedNotebook, place: str) -> list[_Block]:
    """The entry's values, checked and in their parameters' types."""
    sections = {
        "set": run.fixed,
        "grid": run.grid,
        "zip": run.zipped,
        "list": dict.fromkeys(itertools.chain(*run.listed)),
    }
    seen: dict[str, str] = {}
    for section, names in sections.items():
        if twice := next(filter(seen.__contains__, names), None):
            raise SweepFileError(
                f"{place}.{section}.{twice}: {twice} stands in {seen[twice]} too; remove one of"
                " them"
            )
        seen |= dict.fromkeys(names, section)
    lengths = {name: len(values) for name, values in run.zipped.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise SweepFileError(
            f"{place}.zip: {found}; expected as many values of each; add or remove some"
        )

    def checked(where: str, name: str, value: Any) -> dict[str, Value]:
        return {name: _checked(notebook, name, value, f"{place}.{where}")}

    def columns(section: str) -> list[_Block]:
        return [
            [checked(f"{section}.{name}[{i}]", name, value) for i, value in enumerate(values)]
            for name, values in sections[section].items()
        ]

    def together(rows: Iterable[dict[str, Value]]) -> dict[str, Value]:
        return {name: value for row in rows for name, value in row.items()}

    fixed = together(checked(f"set.{name}", name, value) for name, value in run.fixed.items())
    zipped = [together(rows) for rows in zip(*columns("zip"), strict=True)]
    listed = [
        together(checked(f"list[{i}].{name}", name, value) for name, value in row.items())
        for i, row in enumerate(run.listed)
    ]
    return [[fixed], *columns("grid"), *filter(None, (zipped, listed))]


def _checked(notebook: ParsedNotebook, name: str, value: Any, place: str) -> Value:
    try:
        return check_override(notebook, name, value)
    except ParameterError as error:
        default, hint = notebook.parameters.get(name), ""
        if isinstance(default, str) and not isinstance(value, str | list | dict):
            text = str(value).lower() if isinstance(value, bool) else value
            hint = f'; quote it if text is meant: "{text}"'
        elif isinstance(default, list) and not isinstance(value, list):
            hint = "; every value of a list parameter is a list of its own, such as [[1, 2], [3]]"
        elif isinstance(value, str) and not isinstance(default, str | None):
            hint = "; TOML reads what is quoted as text; write it without quotes"
        raise SweepFileError(f"{place}: {error}{hint}") from None
