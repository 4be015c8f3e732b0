"""A sweep file: which notebooks run with which parameters. Everything in it is checked before
anything runs."""

from __future__ import annotations

import difflib
import itertools
import json
import math
import reprlib
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .parameters import ParameterError, ParsedNotebook, check_override, parse_notebook
from .registry import Notebook, Registry, RegistryError, find_notebook
from .store import Value

MOST_RUNS = 10_000

_EXPECTED = {
    "dict_type": "a table of names",
    "finite_number": "a positive number",
    "float_type": "a positive number",
    "greater_than": "a positive number",
    "list_type": "a list such as [first, second]",
    "literal_error": "core or extra",
    "model_type": 'a table such as [[runs]] with notebook = "01"',
    "string_pattern_mismatch": "only a-z, 0-9, _ and -",
    "string_too_short": "some text",
    "string_type": "text",
    "too_short": "at least one element",
}


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
    try:
        file = _File.model_validate({"name": path.stem} | _load(path))
        chosen = list(_entries(file, path.resolve().parent, registry))
        if not chosen:
            filters = " and ".join(
                f"{key} {value}" for key in ("tier", "hardware") if (value := getattr(file, key))
            )
            raise SweepFileError(
                f"{filters}: no notebook of the runs is left; change the filter or remove it"
            )
        count = sum(math.prod(map(len, blocks)) for *_, blocks in chosen)
        if count > MOST_RUNS:
            raise SweepFileError(
                f"runs: {count:,} runs are planned; expected at most {MOST_RUNS:,}; shorten a list"
            )
        return file.name, _expand(chosen)
    except ValidationError as error:
        raise SweepFileError(f"{path}: {_first_problem(error)}") from None
    except OSError as error:
        raise SweepFileError(
            f"{path}: cannot be read ({error.strerror}); expected a sweep file in TOML"
        ) from None
    except UnicodeDecodeError:
        raise SweepFileError(f"{path}: not text in UTF-8; save it as that") from None
    except RecursionError:
        raise SweepFileError(f"{path}: nested too deeply; expected a few levels") from None
    except (SweepFileError, ParameterError, RegistryError) as error:
        raise SweepFileError(f"{path}: {error}") from None


def _load(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    if path.suffix in (".yaml", ".yml"):
        raise SweepFileError(
            "sweep files are TOML now, not YAML; write it as .toml, with [[runs]] and below it"
            ' notebook = "01", grid.count = [1, 2], set.card = "L4"'
        )
    try:
        return tomllib.loads(text)
    except ValueError as error:  # a number of thousands of digits, beside TOML's own
        raise SweepFileError(f"not valid TOML: {error}; correct that line") from None


# An entry of the file, checked: its place, such as runs[0], the notebook as it was found and as it
# was parsed, its time limit, and what varies independently: a run takes one set of each block.
_Block = tuple[dict[str, Value], ...]
_Entry = tuple[str, Notebook, ParsedNotebook, float, list[_Block]]


def _entries(file: _File, folder: Path, registry: Registry) -> Iterator[_Entry]:
    """The entries that the file's filters leave. The others are checked too: they may be wanted
    next time."""
    parsed: dict[Path, ParsedNotebook] = {}
    for index, run in enumerate(file.runs):
        place = f"runs[{index}]"
        try:
            notebook = find_notebook(run.notebook, folder, registry)
        except RegistryError as error:
            raise SweepFileError(f"{place}.notebook: {error}") from None
        if notebook.path not in parsed:
            parsed[notebook.path] = parse_notebook(notebook.path)
        seconds = run.timeout_seconds or float(notebook.entry.timeout_seconds)
        blocks = _blocks(run, parsed[notebook.path], place)
        wanted_tier = file.tier in (None, notebook.entry.tier)
        if wanted_tier and (file.hardware or "") in notebook.entry.hardware:
            yield place, notebook, parsed[notebook.path], seconds, blocks


def _expand(entries: list[_Entry]) -> list[WantedRun]:
    runs: list[WantedRun] = []
    places: dict[str, str] = {}
    for place, notebook, parsed, seconds, blocks in entries:
        for number, choice in enumerate(itertools.product(*blocks), start=1):
            given = {name: value for values in choice for name, value in values.items()}
            run = json.dumps([str(notebook.path), parsed.parameters | given])
            here = f"{place} (its run {number})"
            if run in places:
                values = ", ".join(f"{name}={value!r}" for name, value in given.items())
                raise SweepFileError(
                    f"{here} repeats {places[run]}: {parsed.file} with"
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
        "list": {}.fromkeys(itertools.chain(*run.listed)),
    }
    seen: dict[str, str] = {}
    for section, names in sections.items():
        for name in names:
            if name in seen:
                raise SweepFileError(
                    f"{place}.{section}.{name}: {name} stands in {seen[name]} too; remove one of"
                    " them"
                )
            seen[name] = section
    lengths = {name: len(values) for name, values in run.zipped.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise SweepFileError(
            f"{place}.zip: {found}; expected as many values of each; add or remove some"
        )

    def row(where: str, values: dict) -> dict[str, Value]:
        return {
            name: _checked(notebook, name, value, f"{where}.{name}")
            for name, value in values.items()
        }

    def column(section: str, name: str, values: list) -> list[dict[str, Value]]:
        where = f"{place}.{section}.{name}"
        return [
            {name: _checked(notebook, name, value, f"{where}[{index}]")}
            for index, value in enumerate(values)
        ]

    blocks = [(row(f"{place}.set", run.fixed),)]
    blocks += [tuple(column("grid", name, values)) for name, values in run.grid.items()]
    if run.zipped:
        columns = [column("zip", name, values) for name, values in run.zipped.items()]
        together = zip(*columns, strict=True)
        blocks.append(tuple({k: v for one in row for k, v in one.items()} for row in together))
    if run.listed:
        blocks.append(
            tuple(row(f"{place}.list[{index}]", values) for index, values in enumerate(run.listed))
        )
    return blocks


def _checked(notebook: ParsedNotebook, name: str, value: Any, place: str) -> Value:
    try:
        return check_override(notebook, name, value)
    except ParameterError as error:
        default, hint = notebook.parameters.get(name), ""
        if isinstance(default, str) and not isinstance(value, str | list | dict):
            text = str(value).lower() if isinstance(value, bool) else value
            hint = f'; quote it if text is meant: "{text}"'
        elif isinstance(default, list) and not isinstance(value, list):
            hint = (
                "; every value of a list parameter is a list of its own, such as [[1, 2], [3, 4]]"
            )
        elif isinstance(value, str) and not isinstance(default, str | None):
            hint = "; TOML reads what is quoted as text; write it without quotes"
        raise SweepFileError(f"{place}: {error}{hint}") from None


def _first_problem(error: ValidationError) -> str:
    # "run" is an unknown key and a missing "runs"; the first says more.
    problem = min(error.errors(), key=lambda problem: problem["type"] == "missing")
    *parent, last = problem["loc"]
    place = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]
    ).lstrip(".")
    if problem["type"] == "extra_forbidden":
        model = _Run if parent else _File
        known = [field.alias or name for name, field in model.model_fields.items()]
        close = difflib.get_close_matches(str(last), known, n=1)
        guess = f"did you mean {close[0]}? The keys" if close else "the keys"
        return f"{place}: unknown key; {guess} here are {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{place}: is missing; add it"
    found = reprlib.repr(problem["input"])
    if place == "name":
        found += " (the file's name where none is given)"
    expected = _EXPECTED.get(problem["type"], problem["msg"])
    return f"{place}: {found} is not accepted; expected {expected}; correct it"
