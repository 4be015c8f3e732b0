"""Does the runs of a sweep on a number of worker processes, and can be killed and begun again at
any moment.

What has been done is known from the runs' own ``outcome.json`` alone; nothing else is remembered,
so nothing can disagree with it.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .files import locked, write_whole
from .outcome import FinishedRun, Outcome, RunSpec, Status, Sweep, read_sweep
from .worker import ENDED, NOT_WRITTEN, kill_kernel

# These are results; the others ended for reasons that may be gone the next time.
FINISHED: tuple[Status, ...] = ("done", "oom", "failed", "timeout")
POLL_SECONDS = 0.1
END_SECONDS = 10.0


class SweepError(RuntimeError):
    """A sweep cannot be begun or gone on with; no run is lost by it."""


@dataclass
class Progress:
    """What a display is told: how many runs there are, which ended, and at which cell the others
    are.

    ``note`` is what holds the sweep up, if anything does.
    """

    total: int
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    running: dict[str, tuple[int, int, float]] = field(default_factory=dict)
    note: str = ""

    @property
    def counts(self) -> Counter:
        return Counter(outcome.status for outcome in self.outcomes.values())


def prepare(directory: Path, name: str, specs: Sequence[RunSpec]) -> Sweep:
    """Write down what a sweep is to do; runs that are there already keep their outcomes.

    Raises:
        SweepError: the folder cannot be written.
    """
    created = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    with contextlib.suppress(OSError, ValueError):
        created = Sweep.model_validate_json(
            (directory / "sweep.json").read_text(encoding="utf-8")
        ).created
    sweep = Sweep(name=name, created=created, runs=list(specs))
    try:
        for spec in specs:
            (directory / spec.id).mkdir(parents=True, exist_ok=True)
            # Also where it is already: the time limit and the title may be others, which are not
            # part of the id.
            write_whole(directory / spec.id / "spec.json", spec.model_dump_json(indent=2) + "\n")
        write_whole(directory / "sweep.json", sweep.model_dump_json(indent=2) + "\n")
    except OSError as error:
        raise SweepError(
            f"{directory} cannot be written: {error}. Free space or choose another --output."
        ) from None
    return sweep


def run_sweep(
    directory: Path,
    notebooks: Path,
    workers: int = 1,
    *,
    force: bool = False,
    retry: bool = False,
    minutes: Mapping[str, float] | None = None,
    show: Callable[[Progress], None] = lambda progress: None,
) -> list[FinishedRun]:
    """Do the runs of a prepared sweep that have not ended; returns all of them.

    Args:
        notebooks: the folder with the notebooks.
        workers: how many at a time.
        minutes: what a notebook is expected to take, by file; the longest begin first, so that a
            short one ends last.
        force: also those that are done.
        retry: also those that failed or took too long.
        show: called whenever something has changed, and a few times a second.

    Raises:
        SweepError: another process is at this sweep, or outcomes cannot be written.
        KeyboardInterrupt: what was running has no outcome and is done the next time.
    """
    with only_process(directory):
        _Pool(directory, notebooks, workers, force, retry, minutes or {}, show).run()
    return read_sweep(directory)[1]


@contextlib.contextmanager
def only_process(directory: Path) -> Iterator[None]:
    """Be the only one at this sweep.

    Raises:
        SweepError: another process is at it.
    """
    try:
        # One that has just been killed may still be on its way out.
        with locked(directory / "lock", 3.0):
            yield
    except BlockingIOError:
        raise SweepError(
            f"another process is running {directory}. Wait for it, or choose another --output."
        ) from None


def to_do(directory: Path, force: bool, retry: bool) -> tuple[list[RunSpec], Progress]:
    """The runs of a sweep that are to be done, and the state of the others. An outcome stays until
    its run begins."""
    runs = read_sweep(directory)[1]
    waiting: list[RunSpec] = []
    progress = Progress(len(runs))
    repeated = {"failed", "timeout"} if retry else set()
    for run in runs:
        status = run.outcome.status if run.outcome else None
        if status in FINISHED and status not in repeated and not force:
            progress.outcomes[run.spec.id] = run.outcome
            continue
        waiting.append(run.spec)
    return waiting, progress


def outcome_without_kernel(
    status: Status, error: str, signature: str, seconds: float = 0.0
) -> Outcome:
    """How a run ended of which only its runner can tell."""
    return Outcome(
        status=status,
        started=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
        error=error,
        signature=signature,
    )


def not_written(run: RunSpec, reason: object) -> SweepError:
    """The error of a sweep that cannot keep what it has done."""
    return SweepError(
        f"the outcome of run {run.id} ({run.notebook}) could not be written: {reason}. See to that"
        " and run the same command again; what has ended is kept."
    )


def threads_each(workers: int) -> int:
    """How many threads each of so many workers may compute with, so that together they are no more
    than the cores.

    Threads of PyTorch that wait for each other on a core too few take minutes for what takes
    seconds.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, cores // workers)


class WorkerProcess:
    """A worker process and the run it has been given. Its kernels have ``threads``, unless
    OMP_NUM_THREADS is set."""

    def __init__(self, sweep: Path, notebooks: Path, said: queue.SimpleQueue, threads: int):
        command = [sys.executable, "-m", "nbsweep.worker", str(sweep), str(notebooks)]
        self.log = open(sweep / f"worker-{os.getpid()}.log", "ab")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env={"OMP_NUM_THREADS": str(threads)} | os.environ,
            text=True,
            start_new_session=True,
        )
        self.run: RunSpec | None = None
        self.began = 0.0
        threading.Thread(target=self._listen, args=(said,), daemon=True).start()

    def _listen(self, said: queue.SimpleQueue):
        for line in self.process.stdout:
            said.put((self, line.strip()))
        said.put((self, None))  # it is gone

    def give(self, run: RunSpec):
        self.run, self.began = run, time.monotonic()
        # A worker that has just died cannot take it; that it is gone is noticed by its silence.
        with contextlib.suppress(OSError):
            self.process.stdin.write(run.id + "\n")
            self.process.stdin.flush()

    def killed(self) -> Outcome:
        """How its run ended, of a process that is gone."""
        code = self.process.returncode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return outcome_without_kernel(
            "killed", f"the worker died ({how})", "the worker died", time.monotonic() - self.began
        )

    def end(self):
        """Ask it to end, and see to it."""
        self.process.terminate()
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


class _Pool:
    def __init__(self, directory, notebooks, workers, force, retry, minutes, show):
        self.directory, self.notebooks = directory, notebooks
        self.show = show
        self.said: queue.SimpleQueue = queue.SimpleQueue()
        self.workers: list[WorkerProcess] = []
        self.waiting, self.progress = to_do(directory, force, retry)
        # Outcomes that count no more. One that appears later was written by a worker of a runner
        # that was killed.
        outdated = (directory / spec.id / "outcome.json" for spec in self.waiting)
        self.outdated = {path for path in outdated if path.exists()}
        self.count = max(1, min(workers, len(self.waiting)))
        self.waiting.reverse()  # taken from the end
        self.waiting.sort(key=lambda spec: minutes.get(spec.notebook, 0.0))

    def run(self):
        self.show(self.progress)
        try:
            while self.waiting or any(worker.run for worker in self.workers):
                self._employ()
                self._listen()
                self.show(self.progress)
        finally:
            for worker in self.workers:
                worker.end()
                if worker.run is not None:
                    kill_kernel(self.directory / worker.run.id)
            for log in self.directory.glob(f"worker-{os.getpid()}.log"):
                if log.stat().st_size == 0:
                    log.unlink()

    def _employ(self):
        """Give every idle worker a run, and start workers while there is more to do than there
        are."""
        while self.waiting:
            idle = next((worker for worker in self.workers if worker.run is None), None)
            if idle is None:
                if len(self.workers) >= self.count:
                    return
                idle = WorkerProcess(
                    self.directory, self.notebooks, self.said, threads_each(self.count)
                )
                self.workers.append(idle)
            run = self.waiting.pop()
            if (outcome := self.directory / run.id / "outcome.json") in self.outdated:
                outcome.unlink(missing_ok=True)
            idle.give(run)
            self.progress.running[run.id] = (0, 0, idle.began)

    def _listen(self):
        try:
            worker, line = self.said.get(timeout=POLL_SECONDS)
        except queue.Empty:
            return
        run = worker.run
        if line is None:
            self._bury(worker)
        elif line.startswith("cell ") and run:
            _, cell, cells = line.split()
            self.progress.running[run.id] = (int(cell), int(cells), worker.began)
        elif line.startswith("ended ") and run:
            worker.run = None
            self._ended(run, line.removeprefix("ended "))

    def _ended(self, run: RunSpec, said: str):
        self.progress.running.pop(run.id, None)
        if said != ENDED:
            reason = said.removeprefix(NOT_WRITTEN).strip() or "another process is doing it"
            raise not_written(run, reason)
        path = self.directory / run.id / "outcome.json"
        self.progress.outcomes[run.id] = Outcome.model_validate_json(
            path.read_text(encoding="utf-8")
        )

    def _bury(self, worker: WorkerProcess):
        """A worker is gone: its run, if it had one, was killed with it."""
        self.workers.remove(worker)
        worker.end()
        run = worker.run
        if run is None:
            return
        kill_kernel(self.directory / run.id)
        path = self.directory / run.id / "outcome.json"
        if not path.exists():
            try:
                write_whole(path, worker.killed().model_dump_json(indent=2) + "\n")
            except OSError as error:
                self._ended(run, f"{NOT_WRITTEN} {error}")
        self._ended(run, ENDED)
