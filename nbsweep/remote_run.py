"""One run of a sweep on a Dask worker: in a process of its own, with all its files brought along
and sent back.

A host shares no file system with the one that runs the sweep, and nothing here writes an outcome
that counts: the sweep itself does, with what comes back. Whoever waits for the run may be gone at
any moment; then it is ended.
"""

from __future__ import annotations

import queue
import shutil
import socket
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from distributed import Reschedule, Worker, get_worker

from .files import write_whole
from .outcome import RunSpec
from .pool import POLL_SECONDS, WorkerProcess
from .specs import checkpoint_sizes, package_hash
from .worker import ENDED, RESULT_FILES, kill_kernel

OUTCOME_FILE = "outcome.json"


class HostError(RuntimeError):
    """A host cannot do runs of this sweep; the message names it and says what to do there."""


@dataclass(frozen=True)
class RemoteRun:
    """A run with what its host has to know.

    Attributes:
        notebook: the file's bytes.
        checkpoint: sizes in bytes of the checkpoint's files by name, as ``checkpoint_sizes`` has
            them.
        topic: where the run tells at which cell it is, as {"run": id, "cell": number, "cells":
            number}.
    """

    spec: RunSpec
    notebook: bytes
    checkpoint: dict[str, int]
    topic: str


def perform_remote(run: RemoteRun) -> dict[str, bytes]:
    """Do a run in this thread of a Dask worker; returns the files of its folder by name, the
    outcome among them.

    Raises:
        HostError: this host has another package or checkpoint, or cannot write.
        distributed.Reschedule: the run was cancelled or this worker is closing; its processes have
        been ended.
    """
    worker = get_worker()
    if package_hash() != run.spec.package:
        raise HostError(
            f"{_name(worker)} has another glm4v_nb (source {package_hash()}, expected"
            f" {run.spec.package}). Install the same there and start its worker again"
        )
    try:
        return _bench(worker).perform(run, worker)
    except OSError as error:
        raise HostError(
            f"{_name(worker)} cannot do a run: {error}. See to that host or stop its worker"
        ) from None


class _Bench:
    """A folder and a worker process, for the runs that one thread does one after the other."""

    def __init__(self, folder: Path):
        self.runs, self.notebooks = folder / "runs", folder / "notebooks"
        self.process: WorkerProcess | None = None
        self.said: queue.SimpleQueue = queue.SimpleQueue()

    def perform(self, run: RemoteRun, worker: Worker) -> dict[str, bytes]:
        folder = self._furnish(run, worker)
        if self.process is None or self.process.process.poll() is not None:
            self.said = queue.SimpleQueue()
            self.process = WorkerProcess(self.runs, self.notebooks, self.said, threads=1)
        self.process.give(run.spec)
        ended = None
        try:
            ended = self._follow(run, worker)
        finally:
            if ended is None:
                self.process.end()
                kill_kernel(folder)
        if ended is None and not (folder / OUTCOME_FILE).exists():
            write_whole(
                folder / OUTCOME_FILE, self.process.killed().model_dump_json(indent=2) + "\n"
            )
        elif ended not in (None, ENDED):
            raise OSError(ended)
        names = (*RESULT_FILES, OUTCOME_FILE)
        files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
        shutil.rmtree(folder)
        return files

    def _furnish(self, run: RemoteRun, worker: Worker) -> Path:
        """Put in place what the run needs and nothing else; returns its folder."""
        folder = self.runs / run.spec.id
        for each in (folder, self.notebooks):
            shutil.rmtree(each, ignore_errors=True)
            each.mkdir(parents=True)
        (self.notebooks / run.spec.notebook).write_bytes(run.notebook)
        (folder / "spec.json").write_text(run.spec.model_dump_json(), encoding="utf-8")
        if run.checkpoint != checkpoint_sizes(run.spec.parameters, self.notebooks):
            raise HostError(
                f"{_name(worker)} has another checkpoint, or none, at"
                f" {run.spec.parameters['checkpoint']}. Put the same files there on every host, and"
                " name them by their absolute path"
            )
        return folder

    def _follow(self, run: RemoteRun, worker: Worker) -> str | None:
        """Tell how far the run is until it has ended; returns what its process said last, None if
        that died."""
        key = worker.get_current_task()
        while True:
            try:
                _, line = self.said.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if _unwanted(worker, key):
                    raise Reschedule() from None
                continue
            if line is None:
                return None
            if line.startswith("cell "):
                _, cell, cells = line.split()
                told = {"run": run.spec.id, "cell": int(cell), "cells": int(cells)}
                worker.log_event(run.topic, told)
            elif line.startswith("ended "):
                return line.removeprefix("ended ")


_benches = threading.local()


def _bench(worker: Worker) -> _Bench:
    # Kept from run to run: the process imports torch once. It ends with this one, as it does with a
    # sweep.
    if not hasattr(_benches, "bench"):
        _benches.bench = _Bench(
            Path(tempfile.mkdtemp(prefix="glm4v-nb-", dir=worker.local_directory))
        )
    return _benches.bench


def _unwanted(worker: Worker, key) -> bool:
    """Whether nobody waits for this task: it was cancelled, its client is gone, or its worker lost
    the scheduler."""
    task = worker.state.tasks.get(key)
    return (
        task is None
        or task.state == "cancelled"
        or worker.status.name in ("closing", "closed", "failed")
    )


def _name(worker: Worker) -> str:
    return f"worker {worker.address} on {socket.gethostname()}"
