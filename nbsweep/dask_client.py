"""The connection of a sweep to a Dask scheduler, checked before anything starts."""

from __future__ import annotations

import contextlib
import logging
import queue
import re
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .pool import SweepError
from .specs import package_hash

if TYPE_CHECKING:
    from distributed import Client

CONNECT_SECONDS = 10.0
# Dask's own limit ends where somebody accepts the connection.
ANSWER_SECONDS = 15.0


@contextlib.contextmanager
def connect(address: str) -> Iterator[Client]:
    """A connection to a scheduler whose workers all have this package.

    Raises:
        ValueError: ``address`` is none.
        SweepError: ``distributed`` is not installed, nobody answers, or somebody has another
            glm4v_nb.
    """
    if not re.fullmatch(r"\w+://\S+:\d+", address):
        raise ValueError(
            f"--scheduler is {address!r}; expected an address such as tcp://10.0.0.1:8786."
        )
    try:
        import distributed  # noqa: F401
    except ImportError as error:
        raise SweepError(
            f"--scheduler needs Dask, which cannot be imported ({error}). Install it: pip install"
            " distributed"
        ) from None
    # What it reports with a traceback is said here in one line.
    logger = logging.getLogger("distributed.client")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with _client(address) as client:
            _check_package(client)
            yield client
    finally:
        logger.setLevel(level)


def _client(address: str) -> Client:
    from distributed import Client

    answer: queue.SimpleQueue = queue.SimpleQueue()

    def start():
        try:
            answer.put(Client(address, timeout=CONNECT_SECONDS, set_as_default=False))
        except Exception as error:
            answer.put(error)

    # In a thread that can be left behind: Dask waits for ever where somebody accepts and then says
    # nothing.
    threading.Thread(target=start, name="connect to Dask", daemon=True).start()
    try:
        client = answer.get(timeout=ANSWER_SECONDS)
    except queue.Empty:
        client = OSError("somebody accepts connections, but does not answer as Dask does")
    if isinstance(client, Exception):
        raise SweepError(
            f"no Dask scheduler answers at {address} ({client}). Start one there: dask scheduler"
            " --host ADDRESS; or correct --scheduler"
        )
    return client


def _check_package(client: Client):
    """Functions travel by name, so all must have the same source: the scheduler, which reads them,
    and its workers."""
    found: dict[str, object] = {}
    try:
        found["the scheduler"] = client.run_on_scheduler(package_hash)
    except Exception as error:
        found["the scheduler"] = error
    found |= client.run(package_hash, on_error="return")
    wrong = []
    for who, what in found.items():
        if isinstance(what, OSError):
            continue  # gone in the meantime; the scheduler notices
        if isinstance(what, Exception):
            wrong.append(f"{who} cannot import it ({what})")
        elif what != package_hash():
            wrong.append(f"{who} has source {what}")
    if wrong:
        raise SweepError(
            f"glm4v_nb is not the same everywhere: {'; '.join(wrong)}; expected source"
            f" {package_hash()} as here. Install the same commit there, with the dask extra, and"
            " start these again"
        )
