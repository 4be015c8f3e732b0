"""Runs on a Dask cluster: ``nbsweep sweep --scheduler tcp://HOST:PORT``.

A host shares no file system with the one that runs the sweep: a run brings its notebook along, and
what it leaves is sent back. The cluster decides where a run goes and gives it to another worker if
the first one dies; what has ended is decided by the sweep, which alone writes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .execute import Ended, Job, SourceChanged, Stopped, execute
from .plan import Plan
from .provenance import checkpoint_sizes, package_hash
from .runner import AGAIN, Progress, Threads, ended_without
from .store import RunSpec, SweepError

try:
    import dask.config
    from distributed import Client, Future, KilledWorker, Reschedule, Security, get_worker
    from distributed.comm import connect as connect_to
except ImportError as error:
    raise SweepError(
        f"--scheduler needs Dask, which cannot be imported ({error}). Install it: pip install"
        " distributed"
    ) from None

CONNECT_SECONDS = 10.0
# How long runs may wait while no worker can take them; one that starts anew needs a few seconds.
PATIENCE_SECONDS = 30.0
LOOK_SECONDS = 1.0
RESULT_SECONDS = 60.0


@contextlib.contextmanager
def connect(address: str, packages: Sequence[str]) -> Iterator[Client]:
    """A connection to a scheduler whose workers all have these packages as they are here.

    Raises:
        ValueError: ``address`` is none.
        SweepError: nobody answers, or somebody has other packages.
    """
    if not (found := re.fullmatch(r"(tcp|tls)://(\S+):(\d+)", address)):
        raise ValueError(
            f"--scheduler is {address!r}; expected an address such as tcp://10.0.0.1:8786, or"
            " tls://10.0.0.1:8786 with certificates in Dask's configuration."
        )
    scheme, host, port = found.groups()
    try:
        # In a thread, for a notebook has a loop of its own.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, _greet(address)).result()
    except Exception as error:  # Dask has no class for what may be wrong with a connection
        why = str(error) or "somebody accepts connections, but does not answer as Dask does"
        if scheme == "tls" and not dask.config.get("distributed.comm.tls.client.cert", None):
            why = "there is no certificate for tls:// in Dask's configuration, DASK_CONFIG"
        raise SweepError(
            f"no Dask scheduler answers at {address} ({why}). Start one there: dask scheduler"
            f" --protocol {scheme} --host {host} --port {port} --dashboard-address {host}:8787; or"
            " correct --scheduler"
        ) from None
    # What it reports with a traceback is said here in one line.
    logger = logging.getLogger("distributed.client")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with Client(address, timeout=CONNECT_SECONDS, set_as_default=False) as client:
            _check_packages(client, packages)
            yield client
    finally:
        logger.setLevel(level)


async def _greet(address: str):
    """Whether somebody answers there as Dask does: a client that fails to connect goes on trying
    when Python ends, and waits for ever for one that accepts and says nothing."""
    encryption = Security().get_connection_args("client")
    # Its own timeout ends where somebody accepts the connection.
    async with asyncio.timeout(1.5 * CONNECT_SECONDS):
        comm = await connect_to(address, timeout=CONNECT_SECONDS, **encryption)
    await comm.close()


def _check_packages(client: Client, packages: Sequence[str]):
    """Functions travel by name, so all must have the same source: the scheduler, which reads them,
    and its workers."""
    found = client.run(package_hash, packages, on_error="return")
    try:
        found["the scheduler"] = client.run_on_scheduler(package_hash, packages)
    except Exception as error:
        found["the scheduler"] = error
    expected, wrong = package_hash(packages), []
    for who, what in found.items():
        if isinstance(what, OSError):
            continue  # gone in the meantime; the scheduler notices
        if isinstance(what, Exception):
            wrong.append(f"{who} cannot import it ({what})")
        elif what != expected:
            wrong.append(f"{who} has source {what}")
    if wrong:
        raise SweepError(
            f"{', '.join(packages)}: not the same everywhere: {'; '.join(wrong)}; expected source"
            f" {expected} as here. Install the same commit there, with the dask extra, and"
            " start these again"
        )


def execute_on_worker(job: Job, checkpoint: dict[str, int], topic: str) -> Ended:
    """``execute``, with errors that name the host.

    Args:
        checkpoint: ``checkpoint_sizes`` where the sweep is.
        topic: where the run tells at which cell it is.

    Raises:
        SweepError: this host has other packages or another checkpoint, or cannot write.
        distributed.Reschedule: the run was cancelled or this worker is closing; its processes have
            been ended.
    """
    # Asked from other threads later, which Dask knows nothing of.
    worker = get_worker()
    task = worker.get_current_task()
    folder = Path(worker.local_directory)
    host = f"worker {worker.address} on {socket.gethostname()}"

    def wanted() -> bool:
        """Not if the task was cancelled, its client is gone, or its worker lost the scheduler."""
        state = worker.state.tasks.get(task)
        closing = worker.status.name in ("closing", "closed", "failed")
        return state is not None and state.state != "cancelled" and not closing

    def at_cell(cell: int, cells: int):
        worker.log_event(topic, (job.spec.id, cell, cells))

    try:
        if checkpoint == checkpoint_sizes(job.spec.parameters, folder):
            return execute(job, at_cell, wanted, folder)
        problem = (
            f"has another checkpoint, or none, at {job.spec.parameters['checkpoint']}. Put the same"
            " files there on every host, and name them by their absolute path"
        )
    except Stopped:
        raise Reschedule() from None
    except SourceChanged as error:
        problem = f"has another {error}. Install the same there and start its worker again"
    except OSError as error:
        problem = f"cannot do a run: {error}. See to that host or stop its worker"
    raise SweepError(f"{host} {problem}")


class Cluster(Threads):
    """Runs on the workers of a Dask cluster.

    Args:
        client: of ``connect``.
        plan: what is to be done; the registries say what needs GPUs.
    """

    def __init__(self, client: Client, plan: Plan):
        self._client, self._plan = client, plan
        self._address = client.scheduler.address
        self._workers: list[dict] = []
        self._most_gpus = 0
        self._looked = 0.0
        self._possible: dict[int, float] = {}  # when runs of so many GPUs were last possible
        self._begun: dict[str, float] = {}
        self._topic = f"nbsweep-{uuid.uuid4()}"
        client.subscribe_topic(self._topic, lambda event: self.tell(*event[1]))

    def has_room(self, spec: RunSpec, running: Sequence[RunSpec]) -> bool:
        """Whether the cluster can begin this run now.

        It is not given all runs at once: Dask counts a worker's death against everything it had
        been assigned, begun or not.
        """
        self._look()
        gpus = self._gpus(spec)
        taken = sum(self._gpus(other) == gpus for other in running)
        return len(running) < self._places(0) and taken < self._places(gpus)

    def submit(self, job: Job) -> Future:
        """Begin a run on a worker that has the GPUs it asks for."""
        spec = job.spec
        folder = self._plan.notebooks[spec.notebook].path.parent
        gpus = self._gpus(spec)
        # Never the key of an earlier try, whose result may still be there.
        options = {"key": f"{spec.notebook}-{spec.id}-{uuid.uuid4()}"}
        if gpus:
            options["resources"] = {"GPU": gpus}
        self._begun[options["key"]] = time.monotonic()
        checkpoint = checkpoint_sizes(spec.parameters, folder)
        return self._client.submit(execute_on_worker, job, checkpoint, self._topic, **options)

    def ended(self, future: Future) -> Ended | None:
        """What a run has brought; None if its worker has died with the result."""
        if future.status == "finished":
            with contextlib.suppress(TimeoutError):
                return future.result(timeout=RESULT_SECONDS)
            return None
        if future.status != "error":
            raise self._lost(f"the run is {future.status} there")
        error = future.exception()
        if isinstance(error, KilledWorker):
            seconds = time.monotonic() - self._begun[future.key]
            workers = f"{error.allowed_failures + 1} workers died one after the other"
            return ended_without("killed", f"{workers} while they did it", "workers died", seconds)
        raise SweepError(f"run {future.key}: {error}; then {AGAIN}.")

    def hopeless(self, specs: Iterable[RunSpec], progress: Progress) -> dict[str, str]:
        """Runs that no worker has been able to take for ``PATIENCE_SECONDS``."""
        self._look()
        now, found = time.monotonic(), {}
        for spec in specs:
            gpus = self._gpus(spec)
            last = self._possible.setdefault(gpus, now)
            if self._places(gpus):
                self._possible[gpus] = now
                continue
            want = f"worker that offers GPU={gpus}" if gpus else "worker"
            progress.note(f"waiting for a {want}")
            if now - last >= PATIENCE_SECONDS:
                option = f' --resources "GPU={gpus}"' if gpus else ""
                found[spec.id] = (
                    f"no {want} in {PATIENCE_SECONDS:.0f} s, {len(self._workers)} others. Start"
                    f" one, with its machine's address for HOST: dask worker {self._address} --host"
                    f" HOST --dashboard-address HOST:0 --nthreads 1{option}"
                )
        return found

    def stop(self, futures: Iterable[Future]):
        """Cancel runs; their workers notice, and end what they were doing."""
        with contextlib.suppress(Exception):
            self._client.cancel(list(futures))

    def _look(self):
        """What workers there are, asked once a second."""
        if self._client.status != "running":
            raise self._lost("the connection broke")
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        try:
            workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        except (OSError, KeyError) as error:  # of a client that has lost it, it is empty
            raise self._lost(error) from None
        self._workers = [worker for worker in workers if worker["status"] == "running"]
        # Once seen, GPUs are waited for: runs of one sweep should not differ because a worker
        # starts anew.
        self._most_gpus = max([self._most_gpus, *map(_offered, self._workers)])

    def _gpus(self, spec: RunSpec) -> int:
        """How many a run asks for: what it needs, or what it would rather have where a worker
        offers that."""
        entry = self._plan.notebooks[spec.notebook].entry
        return entry.gpus if entry.needs_gpus or entry.gpus <= self._most_gpus else 0

    def _places(self, gpus: int) -> int:
        """How many runs that ask for so many GPUs the workers can do at a time."""
        return sum(
            min(worker["nthreads"], _offered(worker) // gpus) if gpus else worker["nthreads"]
            for worker in self._workers
        )

    def _lost(self, why: object) -> SweepError:
        return SweepError(
            f"the Dask scheduler at {self._address} is gone ({why}). Start it and its workers"
            f" again, then {AGAIN}."
        )


def _offered(worker: dict) -> int:
    return int(worker["resources"].get("GPU", 0))
