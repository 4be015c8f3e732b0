"""Does the runs of a sweep on a Dask cluster: ``glm4v-nb sweep --scheduler tcp://HOST:PORT``.

The cluster decides where a run goes and gives it to another worker if the first one dies. What has
ended is decided here: this process alone writes into the sweep's folder, so it is the same folder
as that of a sweep on this machine.
"""

from __future__ import annotations

import contextlib
import queue
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .files import write_whole
from .outcome import FinishedRun, Outcome, RunSpec, read_sweep
from .pool import (
    POLL_SECONDS,
    Progress,
    SweepError,
    not_written,
    only_process,
    outcome_without_kernel,
    to_do,
)
from .registry import NotebookEntry
from .specs import checkpoint_sizes
from .worker import RESULT_FILES

if TYPE_CHECKING:
    from distributed import Client, Future

# How long runs may wait while no worker can take them; one that starts anew needs a few seconds.
PATIENCE_SECONDS = 30.0
LOOK_SECONDS = 1.0
RESULT_SECONDS = 60.0
_AGAIN = "run the same command again; what has ended is kept"


def run_on_cluster(
    client: Client,
    directory: Path,
    notebooks: Path,
    entries: Mapping[str, NotebookEntry],
    *,
    force: bool = False,
    retry: bool = False,
    show: Callable[[Progress], None] = lambda progress: None,
) -> list[FinishedRun]:
    """Do the runs of a prepared sweep that have not ended; returns all of them.

    Runs that no worker can take for ``PATIENCE_SECONDS`` end as "not run", and are done the next
    time.

    Args:
        client: of ``dask_client.connect``.
        notebooks: the folder with the notebooks.
        entries: the registry's, by file; they say what needs GPUs.
        force, retry, show: as for ``run_sweep``.

    Raises:
        SweepError: another process is at this sweep, outcomes cannot be written, the scheduler is
            gone, or a host cannot do runs.
        KeyboardInterrupt: what was running has no outcome and is done the next time.
    """
    with only_process(directory):
        _ClusterPool(client, directory, notebooks, entries, force, retry, show).run()
    return read_sweep(directory)[1]


@dataclass
class _Sent:
    """A run that has been given to the cluster, and the GPUs it asks for."""

    spec: RunSpec
    future: Future
    gpus: int
    began: float


class _ClusterPool:
    def __init__(self, client, directory, notebooks, entries, force, retry, show):
        self.client, self.directory, self.notebooks = client, directory, notebooks
        self.entries, self.show = entries, show
        self.address = client.scheduler.address
        self.waiting, self.progress = to_do(directory, force, retry)
        self.sent: dict[str, _Sent] = {}
        self.workers: list[dict] = []
        self.most_gpus = 0
        self.looked = 0.0
        self.possible: dict[int, float] = {}  # when runs of so many GPUs were last possible
        self.told: queue.SimpleQueue = queue.SimpleQueue()
        self.topic = f"glm4v-nb-{uuid.uuid4()}"

    def run(self):
        self.show(self.progress)
        self.client.subscribe_topic(self.topic, lambda event: self.told.put(event[1]))
        try:
            while self.waiting or self.sent:
                if self.client.status != "running":
                    raise self._lost("the connection broke")
                self._look()
                self._send()
                self._listen()
                for sent in [
                    sent for sent in self.sent.values() if sent.future.status != "pending"
                ]:
                    self._collect(sent)
                self._lose_patience()
                self.show(self.progress)
        finally:
            # Their workers notice, and end what they were doing.
            with contextlib.suppress(Exception):
                self.client.cancel([sent.future for sent in self.sent.values()])

    def _look(self):
        """What workers there are."""
        now = time.monotonic()
        if now - self.looked < LOOK_SECONDS:
            return
        self.looked = now
        try:
            workers = self.client.scheduler_info(n_workers=-1)["workers"].values()
        except (OSError, KeyError) as error:  # of a client that has lost it, it is empty
            raise self._lost(error) from None
        self.workers = [worker for worker in workers if worker["status"] == "running"]
        offered = [int(worker["resources"].get("GPU", 0)) for worker in self.workers]
        # Once seen, GPUs are waited for: runs of one sweep should not differ because a worker
        # starts anew.
        self.most_gpus = max([self.most_gpus, *offered])
        for gpus in self._wanted():
            self.possible.setdefault(gpus, now)
            if self._places(gpus):
                self.possible[gpus] = now

    def _gpus(self, spec: RunSpec) -> int:
        """How many a run asks for: what it needs, or what it would rather have where a worker
        offers that."""
        entry = self.entries[spec.notebook]
        return entry.gpus if entry.needs_gpus or entry.gpus <= self.most_gpus else 0

    def _places(self, gpus: int) -> int:
        """How many runs that ask for so many GPUs the workers can do at a time."""
        places = 0
        for worker in self.workers:
            threads = worker["nthreads"]
            places += (
                min(threads, int(worker["resources"].get("GPU", 0)) // gpus) if gpus else threads
            )
        return places

    def _send(self):
        """Give the cluster as many runs as it can do at a time.

        Not all at once: Dask counts a worker's death against everything it had been assigned, begun
        or not.
        """
        from .remote_run import RemoteRun, perform_remote

        for spec in list(self.waiting):
            gpus = self._gpus(spec)
            taken = Counter(sent.gpus for sent in self.sent.values())
            if taken.total() >= self._places(0):
                return
            if taken[gpus] >= self._places(gpus):
                continue
            self.waiting.remove(spec)
            run = RemoteRun(
                spec,
                (self.notebooks / spec.notebook).read_bytes(),
                checkpoint_sizes(spec.parameters, self.notebooks),
                self.topic,
            )
            future = self.client.submit(
                perform_remote,
                run,
                # Never the key of an earlier try, whose result may still be there.
                key=f"{spec.notebook}-{spec.id}-{uuid.uuid4()}",
                resources={"GPU": gpus} if gpus else None,
            )
            self.sent[spec.id] = _Sent(spec, future, gpus, time.monotonic())
            self.progress.running[spec.id] = (0, 0, time.monotonic())

    def _listen(self):
        with contextlib.suppress(queue.Empty):
            told = self.told.get(timeout=POLL_SECONDS)
            if told["run"] in self.sent:
                began = self.sent[told["run"]].began
                self.progress.running[told["run"]] = (told["cell"], told["cells"], began)

    def _collect(self, sent: _Sent):
        """Keep the result of a run that the cluster has done with."""
        from distributed import KilledWorker

        if sent.future.status == "finished":
            try:
                files = sent.future.result(timeout=RESULT_SECONDS)
            except TimeoutError:
                return  # its worker has died with the result; it is done again
            self._end(sent.spec, Outcome.model_validate_json(files["outcome.json"]), files)
        elif sent.future.status == "error":
            error = sent.future.exception()
            if not isinstance(error, KilledWorker):
                raise SweepError(
                    f"run {sent.spec.id} ({sent.spec.notebook}): {error}; then {_AGAIN}."
                ) from None
            why = f"{error.allowed_failures + 1} workers died one after the other while they did it"
            seconds = time.monotonic() - sent.began
            self._end(sent.spec, outcome_without_kernel("killed", why, "workers died", seconds))
        else:
            raise self._lost(f"the run is {sent.future.status} there")

    def _lose_patience(self):
        """End what no worker has been able to do for too long."""
        now = time.monotonic()
        self.progress.note = ""
        for gpus in self._wanted():
            if self._places(gpus):
                continue
            want = f"a worker that offers GPU={gpus}" if gpus else "a worker"
            self.progress.note = f"waiting for {want}"
            if now - self.possible[gpus] < PATIENCE_SECONDS:
                continue
            option = f' --resources "GPU={gpus}"' if gpus else ""
            reason = (
                f"no {want.removeprefix('a ')} in {PATIENCE_SECONDS:.0f} s, {len(self.workers)}"
                f" others. Start one: dask worker {self.address} --nthreads 1{option}"
            )
            outcome = outcome_without_kernel("not run", reason, "no worker that can")
            for sent in [sent for sent in self.sent.values() if sent.gpus == gpus]:
                self.client.cancel([sent.future])
                self._end(sent.spec, outcome)
            for spec in [spec for spec in self.waiting if self._gpus(spec) == gpus]:
                self.waiting.remove(spec)
                self._end(spec, outcome)

    def _wanted(self) -> set[int]:
        """The numbers of GPUs that what is left to do asks for."""
        return {self._gpus(spec) for spec in self.waiting} | {
            sent.gpus for sent in self.sent.values()
        }

    def _end(self, spec: RunSpec, outcome: Outcome, files: Mapping[str, bytes] | None = None):
        """Write down how a run ended, after everything else that it left."""
        folder = self.directory / spec.id
        try:
            for name in RESULT_FILES:
                if name in (files or {}):
                    write_whole(folder / name, files[name])
                else:
                    (folder / name).unlink(missing_ok=True)  # of an earlier try
            write_whole(folder / "outcome.json", outcome.model_dump_json(indent=2) + "\n")
        except OSError as error:
            raise not_written(spec, error) from None
        self.sent.pop(spec.id, None)
        self.progress.running.pop(spec.id, None)
        self.progress.outcomes[spec.id] = outcome

    def _lost(self, why: object) -> SweepError:
        return SweepError(
            f"the Dask scheduler at {self.address} is gone ({why}). Start it and its workers again,"
            f" then {_AGAIN}."
        )
