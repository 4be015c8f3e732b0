"""Does the runs of a sweep, on threads of this process or on a Dask cluster, and can be killed and
begun again at any moment.

What has been done is known from the runs' own ``outcome.json`` alone; nothing else is remembered,
so nothing can disagree with it. This process alone writes in the sweep's folder, but for the
scratch folders of its own runs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from .execute import Ended, Job, SourceChanged, execute
from .kernel import end_leftovers
from .plan import Plan
from .provenance import checkpoint_fingerprint, source_hash
from .store import (
    OUTCOME,
    FinishedRun,
    Outcome,
    RunSpec,
    Status,
    SweepError,
    keep,
    now,
    only_process,
    prepare,
    read_sweep,
)

# These are results; the others ended for reasons that may be gone the next time.
FINISHED: tuple[Status, ...] = ("done", "oom", "failed", "timeout")
POLL_SECONDS = 0.05
AGAIN = "run the same command again; what has ended is kept"


@dataclass
class Progress:
    """What a display is told: how many runs there are, which ended, and at which cell the others
    are.

    ``notes`` are sentences about what holds the sweep up, or was left undone.
    """

    total: int
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    running: dict[str, tuple[int, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def counts(self) -> Counter:
        """How many runs ended in which way."""
        return Counter(outcome.status for outcome in self.outcomes.values())

    def note(self, text: str):
        """Say something, once."""
        if text not in self.notes:
            self.notes.append(text)


class Threads:
    """Where runs are done: on threads of this process, each with a kernel of its own.

    Attributes:
        tell: called with a run's id, the number of the code cell it is at, and how many there are.
    """

    def __init__(self, workers: int):
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="run")
        self._stopped = threading.Event()
        self.tell: Callable[[str, int, int], None] = lambda run, cell, cells: None

    def has_room(self, spec: RunSpec, running: Sequence[RunSpec]) -> bool:
        """Whether this run could begin now, beside those that are running."""
        return len(running) < self._workers

    def submit(self, job: Job) -> Any:
        """Begin a run; returns its future, of ``concurrent.futures`` or of Dask."""
        at_cell = functools.partial(self.tell, job.spec.id)
        return self._pool.submit(execute, job, at_cell, lambda: not self._stopped.is_set())

    def ended(self, future: Any) -> Ended | None:
        """What a future that is done has brought, None if it is to be done again; raises what
        ``execute`` raises."""
        return future.result()

    def hopeless(self, specs: Iterable[RunSpec], progress: Progress) -> dict[str, str]:
        """Runs among these that nothing has been able to do for too long, by id, and why."""
        return {}

    def stop(self, futures: Iterable[Any]) -> None:
        """End these runs and all others; there will be no more."""
        self._stopped.set()
        self._pool.shutdown(wait=True, cancel_futures=True)


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

    Args:
        workers: how many runs at a time.
        force: also those that are done.
        retry: also those that failed or took too long.
        scheduler: the address of a Dask cluster that does them; then ``workers`` says nothing.

    Raises:
        ValueError: ``workers`` is below 1, or ``scheduler`` is no address.
        SweepError: as ``run_sweep``; or no such cluster, or one with other packages.
    """
    from .display import Display

    if workers < 1:
        raise ValueError(
            f"workers is {workers}; expected at least 1. 2 suit a machine of two cores."
        )
    directory = Path(output).resolve() / plan.name
    again = {"force": force, "retry": retry}
    with contextlib.ExitStack() as stack:
        executor = None
        if scheduler:
            from .dask import Cluster, connect

            packages = {name for each in plan.notebooks.values() for name in each.registry.packages}
            client = stack.enter_context(connect(scheduler, sorted(packages)))
            executor = Cluster(client, plan)
        show = stack.enter_context(Display(plan.specs, console)).show
        runs = run_sweep(plan, directory, workers, executor, **again, show=show)
    return runs, directory


def run_sweep(
    plan: Plan,
    directory: Path,
    workers: int = 1,
    executor: Threads | None = None,
    *,
    force: bool = False,
    retry: bool = False,
    show: Callable[[Progress], None] = lambda progress: None,
) -> list[FinishedRun]:
    """Do the runs of a plan that have not ended; returns all of them.

    Those that are expected to take longest begin first, so that a short one ends last. A run whose
    notebook or package was changed before it ended counts as not run.

    Args:
        workers: how many at a time, on threads of this process.
        executor: where runs are done instead.
        force, retry: as for ``carry_out``.
        show: called a few times a second.

    Raises:
        SweepError: another process is at this sweep, its files cannot be written, a machine cannot
            do runs, or this is Windows.
        KeyboardInterrupt: what was running has no outcome and is done the next time.
    """
    if sys.platform == "win32":
        raise SweepError(
            "nbsweep runs notebooks on Linux and macOS alone; on Windows run it in WSL. Reports of"
            " sweeps are written here, too."
        )
    with only_process(directory):
        prepare(directory, plan.name, plan.specs)
        # Of a sweep that was killed: its processes, and what it had begun to write.
        for scratch in directory.glob("*/running"):
            end_leftovers(scratch)
        for partial in directory.rglob("*.partial"):
            partial.unlink(missing_ok=True)
        kept = set() if force else set(FINISHED) - ({"failed", "timeout"} if retry else set())
        _Sweep(plan, directory, workers, executor, kept).run(show)
    return read_sweep(directory)[1]


def threads_each(workers: int) -> int:
    """How many threads each of so many kernels may compute with, so that together they are no more
    than the cores.

    Threads of PyTorch that wait for each other on a core too few take minutes for what takes
    seconds.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, cores // workers)


def exit_code(runs: Iterable[FinishedRun]) -> int:
    """1 if a run failed, took too long, was killed or not run; else 3 if one ran out of memory;
    else 0."""
    statuses = {run.status for run in runs}
    if statuses - {"done", "oom"}:
        return 1
    return 3 if "oom" in statuses else 0


def ended_without(status: Status, error: str, signature: str, seconds: float = 0.0) -> Ended:
    """How a run ended of which only the sweep can tell."""
    outcome = Outcome(status=status, started=now(), seconds=round(seconds, 3), error=error)
    return outcome.model_copy(update={"signature": signature}), {}


class _Sweep:
    """The one loop over the runs of a sweep, wherever they are done."""

    def __init__(
        self,
        plan: Plan,
        directory: Path,
        workers: int,
        executor: Threads | None,
        kept: Container[Status],
    ):
        self.plan, self.directory = plan, directory
        runs = read_sweep(directory)[1]
        problems = [f"{run.problem}. It is done again." for run in runs if run.problem]
        # An outcome stays until its run begins.
        self.progress = Progress(
            len(runs),
            {run.spec.id: run.outcome for run in runs if run.status in kept},
            notes=problems,
        )
        waiting = [run.spec for run in runs if run.status not in kept]
        minutes = {name: each.entry.minutes for name, each in plan.notebooks.items()}
        self.waiting = sorted(waiting, key=lambda spec: -minutes[spec.notebook])
        self.local = executor is None
        workers = max(1, min(workers, len(waiting)))
        self.threads = threads_each(workers) if self.local else 1
        self.executor = executor or Threads(workers)
        self.executor.tell = self._at_cell
        self.futures: dict[Any, RunSpec] = {}

    def run(self, show: Callable[[Progress], None]):
        show(self.progress)
        try:
            while self.waiting or self.futures:
                for spec in list(self.waiting):
                    if self.executor.has_room(spec, list(self.futures.values())):
                        self.waiting.remove(spec)
                        self._begin(spec)
                time.sleep(POLL_SECONDS)
                for future in [future for future in self.futures if future.done()]:
                    self._collect(future)
                self._give_up()
                show(self.progress)
        finally:
            self.executor.stop(self.futures)

    def _at_cell(self, run: str, cell: int, cells: int):
        if run in self.progress.running:
            self.progress.running[run] = (cell, cells)

    def _begin(self, spec: RunSpec):
        notebook, folder = self.plan.notebooks[spec.notebook], self.directory / spec.id
        (folder / OUTCOME).unlink(missing_ok=True)
        if (content := self._unchanged(spec)) is None:
            return
        self.progress.running[spec.id] = (0, 0)
        job = Job(
            spec,
            content,
            notebook.path.parent if self.local else None,
            folder / "running" if self.local else None,
            self.threads,
            notebook.registry,
            (notebook.path.parents[1], self.directory.parent),
        )
        self.futures[self.executor.submit(job)] = spec

    def _unchanged(self, spec: RunSpec) -> bytes | None:
        """The notebook, if it and its checkpoint are what the run is named by."""
        path = self.plan.notebooks[spec.notebook].path
        # It may have been removed, or be half written.
        with contextlib.suppress(OSError, ValueError):
            content = path.read_bytes()
            checkpoint = checkpoint_fingerprint(spec.parameters, path.parent)
            if (source_hash(content), checkpoint) == (spec.source, spec.checkpoint):
                return content
        self._not_kept(f"{path.name} or its checkpoint was changed while the sweep ran")
        return None

    def _not_kept(self, why: str):
        self.progress.note(f"{why}; the runs concerned are not kept. Run the same command again.")

    def _collect(self, future):
        """Keep the result of a run that has ended."""
        spec = self.futures.pop(future)
        self.progress.running.pop(spec.id, None)
        try:
            ended = self.executor.ended(future)
        except SourceChanged as error:
            self._not_kept(str(error))
        except OSError as error:
            what = f"run {spec.id} ({spec.notebook}) could not be done"
            raise _cannot_go_on(what, error) from None
        else:
            if ended is None:
                self.waiting.append(spec)
            elif self._unchanged(spec) is not None:
                self._keep(spec, ended)

    def _give_up(self):
        specs = {spec.id: spec for spec in (*self.waiting, *self.futures.values())}
        for identity, why in self.executor.hopeless(specs.values(), self.progress).items():
            spec = specs[identity]
            for future in [each for each in self.futures if self.futures[each] is spec]:
                self.executor.stop([future])
                del self.futures[future]
            self.waiting = [each for each in self.waiting if each is not spec]
            self.progress.running.pop(identity, None)
            self._keep(spec, ended_without("not run", why, "no worker that can"))

    def _keep(self, spec: RunSpec, ended: Ended):
        outcome, files = ended
        try:
            keep(self.directory / spec.id, outcome, files)
        except OSError as error:
            what = f"the outcome of run {spec.id} ({spec.notebook}) could not be written"
            raise _cannot_go_on(what, error) from None
        self.progress.outcomes[spec.id] = outcome


def _cannot_go_on(what: str, error: OSError) -> SweepError:
    return SweepError(f"{what}: {error}. See to that and {AGAIN}.")
