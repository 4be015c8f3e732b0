"""What ``glm4v-nb serve`` does, from start to end: options, port, model, room, answers."""

import json
import logging
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import uvicorn

    from glm4v_nb.serving.app import build_app
except ImportError as error:
    raise RuntimeError(
        f"serving needs packages that are not installed ({error.name}). Install them with: pip"
        " install '.[serve]'"
    ) from None

from glm4v_nb.inference import load
from glm4v_nb.serving.cache import best_steps
from glm4v_nb.serving.capacity import find_room
from glm4v_nb.serving.engine import Engine
from glm4v_nb.serving.metrics import Metrics
from glm4v_nb.serving.options import BACKLOG, KEY_VARIABLE, Options, bind, listen, read_key
from glm4v_nb.serving.service import Service
from simgpu.fitting import DTYPES

_IDLE_SECONDS = 20  # for a connection to say what it wants
BACKSTOP_SECONDS = 10  # for the engine to end what runs, in words, before connections are cut


def start(options: Options, model, processor, key: str | None = None) -> Service:
    """The service of a loaded model, with its engine running.

    Raises:
        ValueError, torch.OutOfMemoryError: as ``find_room``.
    """
    metrics = Metrics()
    room = find_room(model, options.rows, options.positions)
    decoding = options.decoding
    decoding = best_steps(model, room.cache) if decoding == "auto" else decoding
    engine = Engine(model, room.cache, decoding, options.queue, metrics)
    engine.start()
    name = options.name or Path(options.checkpoint).resolve().name
    body = options.body_mib * 2**20
    return Service(name, processor, engine, metrics, body, key, room.why)


class Server(uvicorn.Server):
    """uvicorn's, which lets waiting requests go when it is told to end, and ends with the engine.

    Args:
        grace_seconds: for what runs, once told to end.
    """

    def __init__(self, service: Service, grace_seconds: int):
        super().__init__(
            uvicorn.Config(
                build_app(service),
                http="h11",
                ws="none",
                lifespan="off",
                access_log=False,
                log_level="warning",
                server_header=False,
                timeout_graceful_shutdown=grace_seconds + BACKSTOP_SECONDS,
                backlog=BACKLOG,
            )
        )
        self.engine, self.grace_seconds = service.engine, grace_seconds
        self._idle = {}  # since when, by connection and the request it had last

    def handle_exit(self, sig, frame):
        self.engine.drain(self.grace_seconds)
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # ten a second
            self._cut_idle()
        return await super().on_tick(counter) or not self.engine.alive

    def _cut_idle(self):
        """uvicorn waits for ever for a request that does not come, or comes in drops."""
        since, now = self._idle, time.monotonic()
        idle = [(each, each.cycle) for each in self.server_state.connections
                if each.cycle is None or each.cycle.response_complete]  # fmt: skip
        self._idle = {each: since.get(each, now) for each in idle}
        for (connection, _), begin in self._idle.items():
            if now - begin > _IDLE_SECONDS:
                connection.transport.abort()

    async def shutdown(self, sockets=None):
        for deadline in self.config.app.state.reading:
            if not deadline.expired():
                deadline.reschedule(0)
        await super().shutdown(sockets)


@contextmanager
def running(options: Options, model, processor) -> Iterator[tuple[Service, str]]:
    """The service of a loaded model in a thread of this process: it, and its address for a client.

    Raises:
        ValueError, OSError, torch.OutOfMemoryError: as ``serve``.
    """
    key = read_key(options)
    listening = bind(options.host, options.port)
    service = start(options, model, processor, key)
    server = Server(service, options.grace_seconds)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield service, address_of(options, listening)
    finally:
        service.engine.drain(options.grace_seconds)
        server.should_exit = True
        thread.join()
        service.engine.stop()


def address_of(options: Options, listening: socket.socket) -> str:
    """As a client on this machine writes it."""
    host = f"[{options.host}]" if ":" in options.host else options.host
    host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    return f"http://{host}:{listening.getsockname()[1]}/v1"


def serve(options: Options, say: Callable[[str], None]):
    """Load the checkpoint and answer until SIGTERM (which ends with exit code 0) or Ctrl-C.

    ``say`` is called with what the person who started it should read.

    Raises:
        ValueError, OSError: the options, the checkpoint, the address.
        torch.OutOfMemoryError: no room.
        RuntimeError: a card has failed, and only a new process can go on.
    """
    # Told to end while it loads, it ends so too; and uvicorn raises the signal again at its end.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    # One line a request, and what failed; uvicorn's own log has neither.
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("glm4v_nb.serving").setLevel(logging.INFO)
    options.check()
    key = read_key(options)
    listening = bind(options.host, options.port)
    model, processor = load(
        options.checkpoint, revision=options.revision, dtype=DTYPES[options.dtype]
    )
    service = start(options, model, processor, key)
    server = Server(service, options.grace_seconds)
    listen(listening)
    say(welcome(service, options, address_of(options, listening)))
    try:
        server.run(sockets=[listening])
    finally:
        service.engine.stop()
    if not service.engine.alive:
        raise RuntimeError("a card has failed; start the service again (systemd does by itself)")


def welcome(service: Service, options: Options, address: str) -> str:
    """Where it listens, what it takes, and a line to copy."""
    cache = service.engine.cache
    # By the shell and a pipe, so that no list of processes and no terminal shows it.
    key = f"${KEY_VARIABLE}"
    if options.key_file is not None:
        key = f"$(cat {shlex.quote(str(options.key_file))})"
    pipe = "" if service.key is None else f'printf "Authorization: Bearer %s" "{key}" | '
    key = "" if service.key is None else " -H @-"
    messages = [{"role": "user", "content": "Hello"}]
    question = shlex.quote(json.dumps({"model": service.name, "messages": messages}))
    return (
        f"{service.name} at {address}: {cache.sequences} requests at a time,"
        f" {options.queue} may wait.\nA request has at most {cache.capacity:,} positions, prompt"
        f" and answer: {service.why}.\nTry:\n"
        f"{pipe}curl {address}/chat/completions -H 'Content-Type: application/json'{key}"
        f" -d {question}\n"
        "Next: docs/serving.md asks with a picture and the openai client. Ctrl-C ends it."
    )
