"""The processes of a run: its kernel, which dies with whoever started it, and all that it starts.

Every one carries a mark in its environment, so that all of them are found and ended, and nobody
else's. A process that empties its environment and leaves its session is found only while its parent
lives.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

# In the environment of a run's processes; its value, a word that nobody else has, is in this file.
MARK = "NBSWEEP_RUN"
MARK_FILE = "mark"
CONNECTION_FILE = "connection.json"
START_SECONDS = 120

# A kernel dies with whoever started it, whatever killed that. This asks Linux for it before it
# becomes the kernel; elsewhere the kernel looks for its parent once a second.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
libc = ctypes.CDLL(None)
if hasattr(libc, "prctl"):
    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class _ThisPython(KernelSpecManager):
    """Knows one kernel: of this Python, whatever the user has registered under its name."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        kernel = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        die = [sys.executable, "-ISc", _DIE_WITH_PARENT, str(os.getpid())]
        return KernelSpec(argv=[*die, *kernel], display_name=kernel_name, language="python")


def kernel_manager(scratch: Path) -> AsyncKernelManager:
    """What starts a kernel of this Python, with its connection file in the scratch folder."""
    return AsyncKernelManager(
        kernel_name="python3",
        kernel_spec_manager=_ThisPython(),
        connection_file=str(scratch.resolve() / CONNECTION_FILE),
    )


async def run_with_kernel(client: NotebookClient, **options):
    """Execute a client's notebook in a kernel that is started for it and ended after it."""
    # Not by nbclient itself: of a kernel that dies as it starts it leaves work for Python's end.
    # ipykernel 7.4 warns at every start that loopback traffic is not encrypted.
    quiet = ["--IPKernelApp.log_level=ERROR", "--HistoryManager.hist_file=:memory:"]
    await client.km.start_kernel(extra_arguments=quiet, **options)
    # A kernel that was killed before it had a process group of its own is still of this one, and
    # jupyter_client ends a kernel by ending its group.
    if client.km.provisioner.pgid == os.getpgrp():
        client.km.provisioner.pgid = None
    client.kc = client.km.client()
    client.kc.start_channels()
    ready = False
    try:
        await client.kc.wait_for_ready(timeout=START_SECONDS)
        client.kc.allow_stdin = False
        await client.async_execute()
        ready = True
    except CellExecutionError:
        ready = True
        raise
    finally:
        client.kc.stop_channels()
        await client.km.shutdown_kernel(now=not ready)


@contextlib.contextmanager
def scratch_folder(scratch: Path | None, parent: Path | None) -> Iterator[tuple[Path, str]]:
    """An empty folder, and the mark of the processes that work in it; both are gone afterwards."""
    mark = secrets.token_hex(16)
    if scratch is None:
        scratch = Path(tempfile.mkdtemp(prefix="nbsweep-", dir=parent))
    else:
        end_leftovers(scratch)
        scratch.mkdir()
    (scratch / MARK_FILE).write_text(mark, encoding="utf-8")
    try:
        yield scratch, mark
    finally:
        end_marked(mark)
        if _mark_of(scratch) == mark:  # and not yet that of another process's next try
            shutil.rmtree(scratch, ignore_errors=True)


def end_leftovers(scratch: Path):
    """End every process of a run that was killed and had this scratch folder, and remove that."""
    if mark := _mark_of(scratch):
        end_marked(mark)
    shutil.rmtree(scratch, ignore_errors=True)


def _mark_of(scratch: Path) -> str:
    try:
        return (scratch / MARK_FILE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def end_marked(mark: str):
    """Kill every process with this mark, in sessions of their own too, until there is none."""
    for _ in range(5):
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == mark and process.pid != os.getpid():
                    process.kill()
                    found.append(process)
        if not found:
            return
        psutil.wait_procs(found, timeout=1)
