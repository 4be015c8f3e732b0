"""From a sweep file, or notebooks and parameters, to the runs that are wanted, each named by what
decides its result."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .parameters import ParameterError, check_override, parse_value
from .provenance import DISTRIBUTION, checkpoint_fingerprint, digest, package_hash
from .registry import Notebook, Registry, RegistryError, find_notebook, find_registry, load_registry
from .store import RunSpec
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
        ValueError: the file, a notebook or the registry is not right; says what and where.
    """
    return _plan(*read_sweep_file(path, _registry(registry, [".ipynb"])))


def plan_suite(names: Sequence[str] | None = None, registry: Path | str | None = None) -> Plan:
    """Each of these notebooks once, by numbers or paths, with its own parameters; without names all
    that are registered, as ``make run`` does.

    Raises:
        ValueError: no such notebook, or the registry is not right.
    """
    listed = _registry(registry, names or ())
    wanted = names or [entry.file for entry in listed.notebook]
    found = {each.path: each for each in (find_notebook(n, Path.cwd(), listed) for n in wanted)}
    chosen = [found[path] for path in sorted(found)]
    name = "-".join(["suite", *(each.entry.number for each in chosen if names)])
    return _plan(name, [WantedRun(each, {}, each.entry.timeout_seconds) for each in chosen])


def plan_notebook(
    name: str, texts: dict[str, str] | Iterable[tuple[str, str]], registry: Path | str | None = None
) -> Plan:
    """One run of a notebook, named by its number or its path, with parameters as they stand on a
    command line: names and texts.

    Raises:
        ValueError: no such notebook or parameter, one given twice, or a value of another type.
    """
    notebook = find_notebook(name, Path.cwd(), _registry(registry, [name]))
    defaults, given = notebook.parsed.parameters, {}
    for parameter, text in texts.items() if isinstance(texts, dict) else texts:
        if parameter in given:
            raise ValueError(f"-p {parameter} is given twice; give it once")
        check_override(notebook.parsed, parameter, defaults.get(parameter, text))
        try:
            given[parameter] = parse_value(text, defaults[parameter])
        except ParameterError as error:
            raise ValueError(f"-p {parameter}: {error}") from None
    wanted = WantedRun(notebook, given, notebook.entry.timeout_seconds)
    return _plan(notebook.path.stem, [wanted])


def _registry(given: Path | str | None, names: Sequence[str]) -> Registry:
    """The registry; an empty one will do where there is none and notebooks are named by paths."""
    try:
        path = find_registry(given)
    except RegistryError:
        if any(name.endswith(".ipynb") for name in names):
            return Registry()
        raise
    return load_registry(path)


def _plan(name: str, runs: Sequence[WantedRun]) -> Plan:
    notebooks: dict[str, Notebook] = {}
    for run in runs:
        file = run.notebook.path.name
        other = notebooks.setdefault(file, run.notebook)
        if other.path != run.notebook.path:
            raise ValueError(f"two notebooks are called {file}; rename one, or give each a sweep")
    package = cache(package_hash)
    specs = [run_spec(run, package(tuple(run.notebook.registry.packages))) for run in runs]
    return Plan(name, specs, notebooks)


def run_spec(run: WantedRun, package: str) -> RunSpec:
    """A run's specification. Its ``id`` changes with notebook, parameters, packages and checkpoint;
    not with the libraries, the machine and its GPUs: the outcome has those.

    Args:
        package: ``package_hash`` of the notebook's packages.
    """
    parameters = run.notebook.parsed.parameters | run.parameters
    identity = {
        "notebook": run.notebook.path.name,
        "source": run.notebook.source,
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
