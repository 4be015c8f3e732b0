"""A sweep file: which notebooks run with which parameters. Everything in it is checked before
anything runs."""

from __future__ import annotations

import difflib
import itertools
import json
import math
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .outcome import Value
from .parameters import ParameterError, ParsedNotebook, check_override, parse_notebook
from .registry import NotebookEntry, Registry
from .strict_yaml import StrictYamlError, load_yaml

MOST_RUNS = 10_000

_EXPECTED = {
    "dict_type": "a mapping of names",
    "finite_number": "a positive number",
    "float_type": "a positive number",
    "greater_than": "a positive number",
    "list_type": "a list such as [first, second]",
    "literal_error": "core or extra",
    "model_type": 'a mapping such as {notebook: "01"}',
    "string_pattern_mismatch": "only a-z, 0-9, _ and -",
    "string_too_short": "some text",
    "string_type": "text",
    "too_short": "at least one element",
}


class SweepError(ValueError):
    """A sweep file is not what it should be; one sentence that names the file and the entry."""


_Values = Annotated[list[Any], Field(min_length=1)]
_Columns = Annotated[dict[str, _Values], Field(min_length=1)]
_Row = Annotated[dict[str, Any], Field(min_length=1)]


class _Run(BaseModel):
    """One of the runs as the file has it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    # "notebook: 1" is as clear as a quoted number; 01, an octal number to YAML, has been refused by
    # then.
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
class SweepEntry:
    """One of the runs of a sweep file, checked.

    Attributes:
        place: where it stands in the file, such as ``runs[0]``.
        blocks: what varies independently: a run takes one set of values of each block.
    """

    place: str
    notebook: ParsedNotebook
    title: str
    timeout_seconds: float
    blocks: tuple[tuple[dict[str, Value], ...], ...]


@dataclass(frozen=True)
class SweepFile:
    """A sweep file in which everything has been checked, with the entries that its filters
    leave."""

    path: Path
    name: str
    entries: tuple[SweepEntry, ...]


@dataclass(frozen=True)
class PlannedRun:
    """One notebook with the parameters that the sweep gives it; the others keep their defaults."""

    notebook: str
    title: str
    parameters: dict[str, Value]
    timeout_seconds: float


def read_sweep_file(path: Path | str, notebooks_dir: Path | str, registry: Registry) -> SweepFile:
    """Read a sweep file and check all of it, each value against the notebook it is for.

    An entry without a timeout has its notebook's timeout_seconds in the registry.

    Raises:
        SweepError: whatever is wrong with the file, ``expand``'s errors included.
    """
    path, directory = Path(path), Path(notebooks_dir)
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise SweepError(
                'top level: expected a mapping, with runs: and below it - notebook: "01"'
            )
        file = _File.model_validate({"name": path.stem} | content)
        entries, parsed = [], {}
        for index, run in enumerate(file.runs):
            place = f"runs[{index}]"
            registered = _registered(run.notebook, registry, f"{place}.notebook")
            if registered.file not in parsed:
                parsed[registered.file] = parse_notebook(directory / registered.file)
            notebook = parsed[registered.file]
            seconds = run.timeout_seconds or float(registered.timeout_seconds)
            # Also what the filters leave out is checked: it may be wanted next time.
            entry = SweepEntry(
                place, notebook, registered.title, seconds, _blocks(run, notebook, place)
            )
            if (
                file.tier in (None, registered.tier)
                and (file.hardware or "") in registered.hardware
            ):
                entries.append(entry)
        if not entries:
            filters = " and ".join(
                f"{key} {value}" for key in ("tier", "hardware") if (value := getattr(file, key))
            )
            raise SweepError(
                f"{filters}: no notebook of the runs is left; change the filter or remove it"
            )
        count = sum(math.prod(map(len, entry.blocks)) for entry in entries)
        if count > MOST_RUNS:
            raise SweepError(
                f"runs: {count:,} runs are planned; expected at most {MOST_RUNS:,}; shorten a list"
            )
    except ValidationError as error:
        raise SweepError(f"{path}: {_first_problem(error)}") from None
    except OSError as error:
        raise SweepError(
            f"{path}: cannot be read ({error.strerror}); expected a sweep file in YAML"
        ) from None
    except UnicodeDecodeError:
        raise SweepError(f"{path}: not text in UTF-8; save it as that") from None
    except (SweepError, ParameterError, StrictYamlError) as error:
        raise SweepError(f"{path}: {error}") from None
    sweep_file = SweepFile(path, file.name, tuple(entries))
    expand(sweep_file)
    return sweep_file


def expand(sweep_file: SweepFile) -> list[PlannedRun]:
    """The runs in the order of the file; within an entry the last name of a grid varies first, then
    zip, then list.

    Raises:
        SweepError: two runs are the same, defaults included; the message names both entries.
    """
    runs: list[PlannedRun] = []
    places: dict[str, str] = {}
    for entry in sweep_file.entries:
        notebook = entry.notebook
        for number, choice in enumerate(itertools.product(*entry.blocks), start=1):
            given = {name: value for values in choice for name, value in values.items()}
            run = json.dumps([notebook.file, notebook.parameters | given])
            place = f"{entry.place} (its run {number})"
            if run in places:
                values = (
                    ", ".join(f"{name}={value!r}" for name, value in given.items())
                    or "the defaults"
                )
                raise SweepError(
                    f"{sweep_file.path}: {place} repeats {places[run]}: {notebook.file} with"
                    f" {values}; remove one"
                )
            places[run] = place
            runs.append(PlannedRun(notebook.file, entry.title, given, entry.timeout_seconds))
    return runs


def _registered(notebook: str, registry: Registry, place: str) -> NotebookEntry:
    for entry in registry.notebook:
        if notebook == entry.file or (notebook.isdecimal() and notebook.zfill(2) == entry.number):
            return entry
    files = [entry.file for entry in registry.notebook]
    close = difflib.get_close_matches(notebook, files, n=1)
    guess = f"did you mean {close[0]}? The" if close else "the"
    numbers = ", ".join(entry.number for entry in registry.notebook) or "none"
    raise SweepError(
        f"{place}: no notebook {notebook!r} is registered; {guess} registry has {numbers}"
    )


def _blocks(
    run: _Run, notebook: ParsedNotebook, place: str
) -> tuple[tuple[dict[str, Value], ...], ...]:
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
                raise SweepError(
                    f"{place}.{section}.{name}: {name} stands in {seen[name]} too; remove one of"
                    " them"
                )
            seen[name] = section

    def checked(where: str, name: str, values: list) -> list[Value]:
        return [
            _checked(notebook, name, value, f"{where}[{index}]")
            for index, value in enumerate(values)
        ]

    def row(where: str, values: dict) -> dict[str, Value]:
        return {
            name: _checked(notebook, name, value, f"{where}.{name}")
            for name, value in values.items()
        }

    blocks = [(row(f"{place}.set", run.fixed),)]
    for name, values in run.grid.items():
        blocks.append(
            tuple({name: value} for value in checked(f"{place}.grid.{name}", name, values))
        )
    if run.zipped:
        lengths = {name: len(values) for name, values in run.zipped.items()}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise SweepError(
                f"{place}.zip: {found}; expected as many values of each; add or remove some"
            )
        columns = [
            checked(f"{place}.zip.{name}", name, values) for name, values in run.zipped.items()
        ]
        blocks.append(
            tuple(
                dict(zip(run.zipped, values, strict=True)) for values in zip(*columns, strict=True)
            )
        )
    if run.listed:
        blocks.append(
            tuple(row(f"{place}.list[{index}]", values) for index, values in enumerate(run.listed))
        )
    return tuple(blocks)


def _checked(notebook: ParsedNotebook, name: str, value: Any, place: str) -> Value:
    try:
        return check_override(notebook, name, value)
    except ParameterError as error:
        default, hint = notebook.parameters.get(name), ""
        if isinstance(default, str) and not isinstance(value, str | list | dict):
            hint = f'; quote it if text is meant: "{json.dumps(value)}"'
        elif isinstance(default, list) and not isinstance(value, list):
            hint = (
                "; every value of a list parameter is a list of its own, such as [[1, 2], [3, 4]]"
            )
        elif isinstance(value, str) and not isinstance(default, str | None):
            hint = (
                "; YAML reads quoted values, and numbers such as 1e5, as text; write it out and"
                " without quotes"
            )
        raise SweepError(f"{place}: {error}{hint}") from None


def _first_problem(error: ValidationError) -> str:
    # "run:" is an unknown key and a missing "runs:"; the first says more.
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
