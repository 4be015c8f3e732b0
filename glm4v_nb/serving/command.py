"""What ``glm4v-nb serve`` does, from start to end: key, port, model, room, answers."""

import ipaddress
import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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
from glm4v_nb.inference.fast import MOST_ROWS
from glm4v_nb.serving.cache import STEPS
from glm4v_nb.serving.capacity import find_room
from glm4v_nb.serving.engine import Engine
from glm4v_nb.serving.metrics import Metrics
from glm4v_nb.serving.service import Service
from simgpu.fitting import DTYPES

KEY_VARIABLE = "GLM4V_NB_API_KEY"
LEAST_KEY = 16  # characters


@dataclass(frozen=True)
class Options:
    """Attributes:
    checkpoint, revision: as of ``load``.
    name: that clients ask for; None: the last part of the checkpoint's.
    host, port: to listen at; port 0 takes a free one.
    key_file: a file with the API key; None: the environment's, or no key.
    rows: requests that run at a time; others wait, at most ``queue`` of them.
    positions: most of a request, prompt and answer; None: as many as the cards have room for.
    body_mib: of a request at most.
    grace_seconds: for what runs when the service is told to end.
    """

    checkpoint: str
    revision: str | None = None
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    key_file: Path | None = None
    dtype: str = "bfloat16"
    decoding: str = "eager"
    rows: int = 8
    queue: int = 64
    positions: int | None = None
    body_mib: int = 20
    grace_seconds: int = 30

    def check(self):
        """ValueError for what can be seen to be wrong before minutes of loading."""
        for name, choices in (("dtype", DTYPES), ("decoding", STEPS)):
            if getattr(self, name) not in choices:
                expected = ", ".join(choices)
                raise ValueError(f"--{name} is {getattr(self, name)!r}; expected one of {expected}")
        least = {"rows": 1, "queue": 0, "body_mib": 1, "grace_seconds": 0, "port": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} is {getattr(self, name)}; expected {smallest} or more")
        if self.port > 65535:
            raise ValueError(f"--port is {self.port}; expected 0 (a free one) to 65535")
        if self.decoding == "fast" and self.rows > MOST_ROWS:
            expected = f"fast decoding takes 1 to {MOST_ROWS}; or use --decoding eager"
            raise ValueError(f"--rows is {self.rows}; {expected}")


def read_key(options: Options) -> str | None:
    """The API key, or None on loopback.

    Raises:
        ValueError: too short, not printable ASCII; or none where others than this machine may ask.
        OSError: the file cannot be read.
    """
    file, where = options.key_file, KEY_VARIABLE
    key = os.environ.get(KEY_VARIABLE)
    if file is not None:
        key, where = file.read_text(encoding="utf-8").strip(), str(file)
    advice = 'Make one: python -c "import secrets; print(secrets.token_urlsafe(32))"'
    if key is not None and (len(key) < LEAST_KEY or not key.isascii() or not key.isprintable()):
        raise ValueError(
            f"the key in {where} has {len(key)} characters; expected {LEAST_KEY} or more, of"
            f" printable ASCII. {advice}"
        )
    if key is None and not _is_loopback(options.host):
        raise ValueError(
            f"--host is {options.host}, where other machines can ask, and there is no key. Put one"
            f" into {KEY_VARIABLE} or into a file for --api-key-file. {advice}"
        )
    return key


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet, so that a port that is taken is known before loading.

    Raises:
        OSError: the address is taken, or not this machine's.
    """
    found = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        if found is not None:
            found.close()
        raise OSError(
            f"cannot listen at --host {host} --port {port}: {error.strerror}."
            " Choose another port, or end what has this one; the host is an address of this"
            " machine."
        ) from None
    return found


def start(options: Options, model, processor, key: str | None = None) -> Service:
    """The service of a loaded model, with its engine running.

    Raises:
        ValueError, torch.OutOfMemoryError: as ``find_room``.
    """
    metrics = Metrics()
    room = find_room(model, options.rows, options.positions)
    engine = Engine(model, room.cache, options.decoding, options.queue, metrics)
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
                timeout_graceful_shutdown=grace_seconds,
            )
        )
        self.engine = service.engine

    def handle_exit(self, sig, frame):
        self.engine.drain()
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or not self.engine.alive


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
        service.engine.drain()
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
    options.check()
    key = read_key(options)
    listening = bind(options.host, options.port)
    model, processor = load(
        options.checkpoint, revision=options.revision, dtype=DTYPES[options.dtype]
    )
    service = start(options, model, processor, key)
    server = Server(service, options.grace_seconds)
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
    key = "" if service.key is None else f' -H "Authorization: Bearer ${KEY_VARIABLE}"'
    messages = [{"role": "user", "content": "Hello"}]
    question = shlex.quote(json.dumps({"model": service.name, "messages": messages}))
    return (
        f"{service.name} at {address}: {cache.sequences} requests at a time,"
        f" {options.queue} may wait.\nA request has at most {cache.capacity:,} positions, prompt"
        f" and answer: {service.why}.\nTry:\n"
        f"curl {address}/chat/completions -H 'Content-Type: application/json'{key}"
        f" -d {question}\n"
        "Next: docs/serving.md asks with a picture and the openai client. Ctrl-C ends it."
    )
