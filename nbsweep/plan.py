"""From a sweep file, or notebooks and parameters, to the runs that are wanted, each named by what
decides its result."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .parameters import check_override, parse_notebook, parse_value
from .provenance import DISTRIBUTION, checkpoint_fingerprint, digest, package_hash, source_hash
from .registry import Notebook, Registry, RegistryError, find_notebook, find_registry, load_registry
from .store import RunSpec, Value
from .sweepfile import WantedRun, read_sweep_file

PREDICTORS = "nbsweep.predictors"


@dataclass(frozen=True)
class Plan:
    """A name for the folder, the runs, and their notebooks by ``RunSpec.notebook``."""

    name: str
    specs: list[RunSpec]
    notebooks: dict[str, Notebook]

    @property
    def minutes(self) -> float:
        """What the registry expects of the runs one after the other."""
        return sum(self.notebooks[spec.notebook].entry.minutes for spec in self.specs)


def plan_file(path: Path | str, registry: Path | str | None = None) -> Plan:
    """The runs of a sweep file.

    Raises:
        ValueError: the file, a notebook or the registry is not right; the message says what and
            where.
    """
    return _plan(*read_sweep_file(path, _registry(registry)))


def plan_suite(numbers: Sequence[str] | None = None, registry: Path | str | None = None) -> Plan:
    """Each of these registered notebooks once, with its own parameters; for None all of them, as
    ``make run`` does. A path of a notebook is as good as a number.

    Raises:
        ValueError: no such notebook, or the registry is not right.
    """
    if any(number.endswith(".ipynb") for number in numbers or ()):
        found = [find_notebook(each, Path.cwd(), _registry(registry)) for each in numbers]
    else:
        listed = load_registry(registry)
        found = [
            Notebook(listed.folder / entry.file, entry, listed) for entry in listed.select(numbers)
        ]
    names = [each.entry.number for each in found] if numbers else []
    wanted = [WantedRun(each, {}, float(each.entry.timeout_seconds)) for each in found]
    return _plan("-".join(["suite", *names]), wanted)


def plan_notebook(name: str, texts: dict[str, str], registry: Path | str | None = None) -> Plan:
    """One run of a notebook, named by its number or its path, with parameters as they stand on a
    command line.

    Raises:
        ValueError: no such notebook or parameter, or a value of another type.
    """
    listed = _registry(registry) if name.endswith(".ipynb") else load_registry(registry)
    notebook = find_notebook(name, Path.cwd(), listed)
    parsed = parse_notebook(notebook.path)
    given = {}
    for parameter, text in texts.items():
        check_override(parsed, parameter, parsed.parameters.get(parameter, text))
        try:
            given[parameter] = parse_value(text, parsed.parameters[parameter])
        except ValueError as error:
            raise ValueError(f"-p {parameter}: {error}") from None
    wanted = WantedRun(notebook, given, float(notebook.entry.timeout_seconds))
    return _plan(notebook.path.stem, [wanted])


def _registry(given: Path | str | None) -> Registry:
    """The registry; an empty one where there is none, and notebooks are named by their paths."""
    try:
        path = find_registry(given)
    except RegistryError:
        return Registry()
    return load_registry(path)


def _plan(name: str, runs: Sequence[WantedRun]) -> Plan:
    notebooks: dict[str, Notebook] = {}
    for run in runs:
        other = notebooks.setdefault(run.notebook.path.name, run.notebook)
        if other.path != run.notebook.path:
            raise ValueError(
                f"two notebooks are called {other.path.name}; rename one, or give each a sweep"
            )
    defaults = cache(lambda path: parse_notebook(path).parameters)
    source = cache(lambda path: source_hash(path.read_bytes()))
    package = cache(package_hash)
    specs = [
        run_spec(
            run,
            defaults(run.notebook.path),
            source(run.notebook.path),
            package(tuple(run.notebook.registry.packages)),
        )
        for run in runs
    ]
    return Plan(name, specs, notebooks)


def run_spec(run: WantedRun, defaults: dict[str, Value], source: str, package: str) -> RunSpec:
    """A run's specification; its ``id`` changes with notebook, parameters, packages and checkpoint.

    Not with the libraries, the machine and its GPUs: the outcome has those.

    Args:
        defaults: all parameters of the notebook.
        source, package: ``source_hash`` of the notebook, ``package_hash`` of its packages.
    """
    parameters = defaults | run.parameters
    identity = {
        "notebook": run.notebook.path.name,
        "source": source,
        "parameters": parameters,
        "package": package,
        "checkpoint": checkpoint_fingerprint(parameters, run.notebook.path.parent),
    }
    return RunSpec(
        id=digest(json.dumps(identity, sort_keys=True)),
        title=run.notebook.entry.title,
        given=sorted(run.parameters),
        version=importlib.metadata.version(DISTRIBUTION),
        timeout_seconds=run.timeout_seconds,
        **identity,
    )


def predict(specs: Iterable[RunSpec]) -> dict[str, str]:
    """What installed packages say beforehand of how runs will end: {id: sentence}.

    Their predictors are entry points of the group "nbsweep.predictors": functions of a notebook's
    file name and all its parameters that return a few words, or None where they cannot tell.
    """
    predictors = [point.load() for point in importlib.metadata.entry_points(group=PREDICTORS)]
    found = {}
    for spec in specs:
        answers = (predictor(spec.notebook, spec.parameters) for predictor in predictors)
        if words := next(filter(None, answers), None):
            found[spec.id] = words
    return found
