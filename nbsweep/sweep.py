"""From a sweep file, or notebooks and parameters, to finished runs: ``glm4v-nb sweep`` and
``run``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from .cluster import run_on_cluster
from .dask_client import connect
from .display import Display
from .outcome import FinishedRun, RunSpec
from .parameters import check_override, parse_notebook, parse_value
from .pool import prepare, run_sweep
from .registry import DEFAULT_REGISTRY, NotebookEntry, load_registry
from .specs import run_spec, source_hash
from .sweeps import PlannedRun, expand, read_sweep_file

# Parameters of a notebook that say what goes onto which cards; those it has are what a prediction
# is made from.
_WORKLOAD = ("batch_size", "images", "text_tokens", "new_tokens")


@dataclass(frozen=True)
class Plan:
    """A name for the folder and the runs.

    Attributes:
        minutes: what the registry expects of them one after the other.
        entries: the registry's, by file.
    """

    name: str
    specs: list[RunSpec]
    minutes: float
    notebooks: Path
    entries: dict[str, NotebookEntry]


def plan_file(path: Path | str, registry: Path | str = DEFAULT_REGISTRY) -> Plan:
    """The runs of a sweep file.

    Raises:
        ValueError: the file, a notebook or the registry is not right; the message says what and
            where.
    """
    registry = Path(registry)
    notebooks = registry.resolve().parent
    sweep_file = read_sweep_file(path, notebooks, load_registry(registry))
    return _plan(sweep_file.name, expand(sweep_file), registry)


def plan_suite(
    numbers: Sequence[str] | None = None, registry: Path | str = DEFAULT_REGISTRY
) -> Plan:
    """Each of these registered notebooks once, with its own parameters; for None all of them, as
    ``make run`` does.

    Raises:
        ValueError: no such notebook, or the registry is not right.
    """
    registry = Path(registry)
    entries = load_registry(registry).select(numbers)
    runs = [
        PlannedRun(entry.file, entry.title, {}, float(entry.timeout_seconds)) for entry in entries
    ]
    name = "-".join(["suite", *(entry.number for entry in entries)]) if numbers else "suite"
    return _plan(name, runs, registry)


def plan_notebook(
    number: str, texts: dict[str, str], registry: Path | str = DEFAULT_REGISTRY
) -> Plan:
    """One run of a registered notebook, with parameters as they stand on a command line.

    Raises:
        ValueError: no such notebook or parameter, or a value of another type.
    """
    registry = Path(registry)
    (entry,) = load_registry(registry).select([number])
    notebook = parse_notebook(registry.resolve().parent / entry.file)
    given = {}
    for name, text in texts.items():
        check_override(notebook, name, notebook.parameters.get(name, text))
        try:
            given[name] = parse_value(text, notebook.parameters[name])
        except ValueError as error:
            raise ValueError(f"-p {name}: {error}") from None
    run = PlannedRun(entry.file, entry.title, given, float(entry.timeout_seconds))
    return _plan(entry.file.removesuffix(".ipynb"), [run], registry)


def _plan(name: str, runs: Sequence[PlannedRun], registry: Path) -> Plan:
    notebooks = registry.resolve().parent
    entries = {entry.file: entry for entry in load_registry(registry).notebook}
    files = {run.notebook for run in runs}
    parsed = {file: parse_notebook(notebooks / file) for file in files}
    sources = {file: source_hash(notebooks / file) for file in files}
    specs = [
        run_spec(
            notebooks / run.notebook,
            run.title,
            parsed[run.notebook].parameters,
            run.parameters,
            run.timeout_seconds,
            sources[run.notebook],
        )
        for run in runs
    ]
    return Plan(name, specs, sum(entries[run.notebook].minutes for run in runs), notebooks, entries)


def carry_out(
    plan: Plan,
    output: Path | str,
    workers: int,
    console: Console,
    *,
    force: bool = False,
    retry: bool = False,
    scheduler: str | None = None,
) -> tuple[list[FinishedRun], Path]:
    """Do the runs of a plan that have not ended, in ``output/<name>``; returns all runs and that
    folder.

    ``scheduler`` is the address of a Dask cluster that does them; then ``workers`` says nothing.

    Raises:
        ValueError: ``workers`` is below 1, or ``scheduler`` is no address.
        SweepError: as ``run_sweep``, ``connect`` and ``run_on_cluster``.
    """
    if workers < 1:
        raise ValueError(
            f"workers is {workers}; expected at least 1. 2 suit a machine of two cores."
        )
    directory = Path(output).resolve() / plan.name
    again = {"force": force, "retry": retry}
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(connect(scheduler)) if scheduler else None
        prepare(directory, plan.name, plan.specs)
        show = stack.enter_context(Display(plan.specs, workers, console)).show
        if cluster:
            runs = run_on_cluster(
                cluster, directory, plan.notebooks, plan.entries, **again, show=show
            )
        else:
            minutes = {file: entry.minutes for file, entry in plan.entries.items()}
            runs = run_sweep(
                directory, plan.notebooks, workers, **again, minutes=minutes, show=show
            )
    return runs, directory


def exit_code(runs: Iterable[FinishedRun]) -> int:
    """1 if a run failed, took too long, was killed or not run; else 3 if one ran out of memory;
    else 0."""
    statuses = {run.status for run in runs}
    if statuses - {"done", "oom"}:
        return 1
    return 3 if "oom" in statuses else 0


def predict(specs: Iterable[RunSpec], on_each=lambda: None) -> dict[str, str]:
    """What ``fit`` says of the full-size model with each run's cards and workload: {id: sentence}.

    Runs of notebooks without a card among their parameters are left out; so are those that ``fit``
    refuses. ``on_each`` is called after each different setting.
    """
    from glm4v_nb.fit import fit
    from glm4v_nb.workload import Workload

    sentences: dict[tuple, str | None] = {}
    found = {}
    for spec in specs:
        parameters = spec.parameters
        if not isinstance(parameters.get("card"), str) or not parameters["card"]:
            continue
        sizes = {
            name: parameters[name] for name in _WORKLOAD if isinstance(parameters.get(name), int)
        }
        key = (
            parameters["card"],
            parameters.get("count", 1),
            parameters.get("dtype", "bfloat16"),
            *sizes.items(),
        )
        if key not in sentences:
            try:
                result = fit(*key[:3], workload=Workload(**sizes))
                sentences[key] = (
                    "fits"
                    if result.fits
                    else f"does not fit: card {result.oom.device}, {result.oom.phase}"
                )
            except ValueError:
                sentences[key] = None
            on_each()
        if sentences[key]:
            found[spec.id] = sentences[key]
    return found
