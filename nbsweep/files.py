"""Files that are whole at every moment, and a lock that ends with the process that holds it."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path


def write_whole(path: Path, content: str | bytes):
    """Replace a file so that a reader, or whoever comes after a crash, sees the old text or the
    new, never a part.

    Raises:
        OSError: it cannot be written, on a full disk for example; the old file is still there.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


@contextlib.contextmanager
def locked(path: Path, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold the lock of this path; a killed process loses it at once.

    Raises:
        BlockingIOError: another process holds it still after ``wait_seconds``.
    """
    with path.open("a") as file:
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.1)
        yield
