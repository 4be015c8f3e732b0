"""What a service is started with: its options, its key, and the address that it listens at."""

import ipaddress
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from glm4v_nb.inference.fast import MOST_ROWS
from glm4v_nb.serving.cache import STEPS
from simgpu.fitting import DTYPES

KEY_VARIABLE = "GLM4V_NB_API_KEY"
LEAST_KEY = 16  # characters
STUCK_SECONDS = 30
# Clients that wait to be let in. Each is a line in the log, every second, when no more files can be
# opened.
BACKLOG = 128
DECODING = ("auto", *STEPS)


@dataclass(frozen=True)
class Options:
    """Attributes:
    checkpoint, revision: as of ``load``.
    name: that clients ask for; None: the last part of the checkpoint's.
    host, port: to listen at; port 0 takes a free one.
    key_file: a file with the API key; None: the environment's, or no key.
    decoding: "fast" for fused kernels, "eager", or "auto": fast where that can be had.
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
    decoding: str = "auto"
    rows: int = 8
    queue: int = 64
    positions: int | None = None
    body_mib: int = 20
    grace_seconds: int = 30

    def check(self):
        """ValueError for what can be seen to be wrong before minutes of loading."""
        for name, choices in (("dtype", DTYPES), ("decoding", DECODING)):
            if getattr(self, name) not in choices:
                expected = ", ".join(choices)
                raise ValueError(f"--{name} is {getattr(self, name)!r}; expected one of {expected}")
        ranges = {"rows": (1, 1024), "queue": (0, 100_000), "body_mib": (1, 1024)}
        ranges |= {"grace_seconds": (0, 86_400), "port": (0, 65_535)}  # port 0: a free one
        for name, (least, most) in ranges.items():
            if not least <= getattr(self, name) <= most:
                option = f"--{name.replace('_', '-')} is {getattr(self, name)}"
                raise ValueError(f"{option}; expected {least} to {most:,}")
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
        key, where = file.read_text(encoding="utf-8", errors="replace"), str(file)
    key = None if key is None else key.strip()  # as that of a header is
    advice = 'Make one: python -c "import secrets; print(secrets.token_urlsafe(32))"'
    if key is not None and (len(key) < LEAST_KEY or not key.isascii() or not key.isprintable()):
        raise ValueError(
            f"the key in {where} has {len(key)} characters; expected {LEAST_KEY} or more, of"
            f" printable ASCII. {advice}"
        )
    if key is None and not is_loopback(options.host):
        raise ValueError(
            f"--host is {options.host}, where other machines can ask, and there is no key. Put one"
            f" into {KEY_VARIABLE} or into a file for --api-key-file. {advice}"
        )
    return key


def is_loopback(host: str) -> bool:
    """Whether a name or an address, as in a URL, is this machine's for itself."""
    with suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host.lower() == "localhost"


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
        # Connections have it from here: who takes nothing of an answer for so long is cut off.
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STUCK_SECONDS * 1000)
        found.bind(address)
    except (OSError, UnicodeError) as error:  # the latter of a name that is none
        if found is not None:
            found.close()
        raise _no_address(host, port, error) from None
    return found


def listen(bound: socket.socket):
    """Let clients in, who wait until they are answered.

    Raises:
        OSError: another that was bound to the same address has been faster.
    """
    try:
        bound.listen(BACKLOG)
    except OSError as error:
        raise _no_address(*bound.getsockname()[:2], error) from None


def _no_address(host: str, port: int, error: Exception) -> OSError:
    return OSError(
        f"cannot listen at --host {host} --port {port}: {getattr(error, 'strerror', error)}. Choose"
        " another port, or end what has this one; the host is an address of this machine."
    )
