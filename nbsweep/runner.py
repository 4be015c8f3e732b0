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
import queue
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from .execute import Ended, Job, Link, SourceChanged, execute
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
POLL_SECONDS = 0.1
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


class RunKilled(RuntimeError):
    """What did a run has died of it, or with it, too often."""


class Threads:
    """Where runs are done: on threads of this process, each with a kernel of its own.

    Attributes:
        tell: called with a run's id, the number of the code cell it is at, and how many there are.
    """

    def __init__(self, workers: int):
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="run")
        self._links: list[Link] = []
        self.tell: Callable[[str, int, int], None] = lambda run, cell, cells: None

    def has_room(self, spec: RunSpec, running: Sequence[RunSpec]) -> bool:
        """Whether this run could begin now, beside those that are running."""
        return len(running) < self._workers

    def submit(self, job: Job) -> Any:
        """Begin a run; returns its future, of ``concurrent.futures`` or of Dask."""
        link = Link(functools.partial(self.tell, job.spec.id))
        self._links.append(link)
        return self._pool.submit(execute, job, link)

    def ended(self, future: Any) -> Ended | None:
        """What a future that is done has brought, None if it is to be done again; raises what
        ``execute`` raises, or RunKilled."""
        return future.result()

    def hopeless(self, specs: Iterable[RunSpec], progress: Progress) -> dict[str, str]:
        """Runs among these that nothing has been able to do for too long, by id, and why."""
        return {}

    def stop(self, futures: Iterable[Any]) -> None:
        """End these runs and all others; there will be no more."""
        # Not the futures alone: an interrupt may come before the sweep has noted the newest.
        for link in self._links:
            link.wanted = False
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
        show: called whenever something has changed, and a few times a second.

    Raises:
        SweepError: another process is at this sweep, its files cannot be written, or a machine
            cannot do runs.
        KeyboardInterrupt: what was running has no outcome and is done the next time.
    """
    with only_process(directory):
        prepare(directory, plan.name, plan.specs)
        # Of a sweep that was killed: its processes, and what it had begun to write.
        for scratch in directory.glob("*/running"):
            end_leftovers(scratch)
        for partial in directory.rglob("*.partial"):
            partial.unlink(missing_ok=True)
        _Sweep(plan, directory, workers, executor, force, retry, show).run()
    return read_sweep(directory)[1]


def threads_each(workers: int) -> int:
    """How many threads each of so many kernels may compute with, so that together they are no more
    than the cores.

    Threads of PyTorch that wait for each other on a core too few take minutes for what takes
    seconds.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, cores // workers)


def exit_code(runs: Iterable[FinishedRun]) -> int:
    """1 if a run failed, took too long, was killed or not run; else 3 if one ran out of memory;
    else 0."""
    statuses = {run.status for run in runs}
    if statuses - {"done", "oom"}:
        return 1
    return 3 if "oom" in statuses else 0


class _Sweep:
    """The one loop over the runs of a sweep, wherever they are done."""

    def __init__(self, plan, directory, workers, executor, force, retry, show):
        self.plan, self.directory, self.show = plan, directory, show
        runs = read_sweep(directory)[1]
        self.progress = Progress(len(runs))
        self.waiting: list[RunSpec] = []
        repeated = {"failed", "timeout"} if retry else set()
        for run in runs:
            # An outcome stays until its run begins.
            if run.status in FINISHED and run.status not in repeated and not force:
                self.progress.outcomes[run.spec.id] = run.outcome
            else:
                self.waiting.append(run.spec)
        self.waiting.sort(key=lambda spec: -plan.notebooks[spec.notebook].entry.minutes)
        self.local = executor is None
        workers = max(1, min(workers, len(self.waiting)))
        self.threads = threads_each(workers) if self.local else 1
        self.executor = executor or Threads(workers)
        self.executor.tell = self._at_cell
        self.futures: dict[Any, tuple[RunSpec, float]] = {}
        self.woken: queue.SimpleQueue = queue.SimpleQueue()

    def run(self):
        self.show(self.progress)
        try:
            while self.waiting or self.futures:
                for spec in list(self.waiting):
                    running = [other for other, _ in self.futures.values()]
                    if self.executor.has_room(spec, running):
                        self.waiting.remove(spec)
                        self._begin(spec)
                with contextlib.suppress(queue.Empty):
                    self.woken.get(timeout=POLL_SECONDS)
                for future in [future for future in self.futures if future.done()]:
                    self._collect(future)
                self._give_up()
                self.show(self.progress)
        finally:
            self.executor.stop(self.futures)

    def _at_cell(self, run: str, cell: int, cells: int):
        if run in self.progress.running:
            self.progress.running[run] = (cell, cells)

    def _begin(self, spec: RunSpec):
        notebook, folder = self.plan.notebooks[spec.notebook], self.directory / spec.id
        (folder / OUTCOME).unlink(missing_ok=True)
        if not (content := self._unchanged(spec)):
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
        future = self.executor.submit(job)
        self.futures[future] = (spec, time.monotonic())
        future.add_done_callback(lambda done: self.woken.put(None))

    def _unchanged(self, spec: RunSpec) -> bytes | None:
        """The notebook, if it and its checkpoint are what the run is named by."""
        path = self.plan.notebooks[spec.notebook].path
        try:
            content = path.read_bytes()
            same = (source_hash(content), checkpoint_fingerprint(spec.parameters, path.parent)) == (
                spec.source,
                spec.checkpoint,
            )
        except (OSError, ValueError):  # removed, or half written
            same = False
        if same:
            return content
        self._not_run(f"{path.name} or its checkpoint was changed while the sweep ran")
        return None

    def _not_run(self, why: str):
        self.progress.note(f"{why}; the runs concerned are not kept. Run the same command again.")

    def _collect(self, future):
        """Keep the result of a run that has ended."""
        spec, began = self.futures.pop(future)
        self.progress.running.pop(spec.id, None)
        try:
            ended = self.executor.ended(future)
        except SourceChanged as error:
            self._not_run(str(error))
        except RunKilled as error:
            seconds = round(time.monotonic() - began, 3)
            self._end(spec, "killed", str(error), "workers died", seconds)
        except OSError as error:
            raise SweepError(
                f"run {spec.id} ({spec.notebook}) could not be done: {error}. See to that and"
                f" {AGAIN}."
            ) from None
        else:
            if ended is None:
                self.waiting.append(spec)
            elif self._unchanged(spec):
                self._keep(spec, ended.outcome, ended.files)

    def _give_up(self):
        specs = [*self.waiting, *(spec for spec, _ in self.futures.values())]
        for identity, why in self.executor.hopeless(specs, self.progress).items():
            self.waiting = [each for each in self.waiting if each.id != identity]
            for future in [each for each in self.futures if self.futures[each][0].id == identity]:
                self.executor.stop([future])
                del self.futures[future]
            self.progress.running.pop(identity, None)
            (spec,) = (each for each in specs if each.id == identity)
            self._end(spec, "not run", why, "no worker that can", 0.0)

    def _end(self, spec: RunSpec, status: Status, error: str, signature: str, seconds: float):
        """Keep how a run ended of which only the sweep can tell."""
        outcome = Outcome(
            status=status, started=now(), seconds=seconds, error=error, signature=signature
        )
        self._keep(spec, outcome, {})

    def _keep(self, spec: RunSpec, outcome: Outcome, files: dict[str, bytes]):
        try:
            keep(self.directory / spec.id, outcome, files)
        except OSError as error:
            raise SweepError(
                f"the outcome of run {spec.id} ({spec.notebook}) could not be written: {error}. See"
                f" to that and {AGAIN}."
            ) from None
        self.progress.outcomes[spec.id] = outcome
