"""Executes one notebook through papermill, in this Python's own kernel, and says truthfully how it
ended.

papermill alone marks every cell "completed" when the kernel dies, and has a timeout per cell only.
Here the status comes from the exception, and a watchdog stops the whole notebook.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import papermill
import psutil
from nbclient.exceptions import DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine, papermill_engines
from papermill.exceptions import PapermillExecutionError, strip_color

from .registry import NotebookEntry
from .result import NotebookResult, without_private_paths

KERNEL_NAME = "python3"
KERNEL_ENVIRONMENT = {
    # Nothing in the suite downloads; a lesson that tried would wait for a network that may not be
    # there.
    "HF_HUB_OFFLINE": "1",
    # The environment's own kernel, also when the user has registered another "python3".
    "JUPYTER_PREFER_ENV_PATH": "1",
}
KERNEL_START_SECONDS = 120


def kernel_process(client: PapermillNotebookClient):
    """The kernel's process, None before it is started."""
    return getattr(getattr(client.km, "provisioner", None), "process", None)


def kill_tree(pid: int) -> None:
    """Kill a process and all that it started, in process groups of their own too."""
    try:
        process = psutil.Process(pid)
        family = [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return
    # A kernel leads its own process group, in which may be orphans of its children.
    with contextlib.suppress(OSError):
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()


class _Watchdog:
    """Kills the kernel, and what it started, once `seconds` have passed; then `fired` is true."""

    def __init__(self, client: PapermillNotebookClient, seconds: float):
        self.fired = False
        self._client = client
        self._timer = threading.Timer(seconds, self._kill)
        self._timer.daemon = True

    def __enter__(self) -> _Watchdog:
        self._timer.start()
        return self

    def __exit__(self, *_) -> None:
        self._timer.cancel()

    def _kill(self) -> None:
        process = kernel_process(self._client)
        if process is None or process.poll() is not None:
            return
        self.fired = True
        kill_tree(process.pid)


class NotebookTimeout(RuntimeError):
    """A notebook ran longer than its registry entry allows."""


class SuiteEngine(Engine):
    """papermill's engine with a watchdog, a callback before each code cell, and the kernel's
    environment."""

    @classmethod
    def execute_managed_notebook(
        cls,
        nb_man,
        kernel_name,
        *,
        timeout_seconds: float,
        on_cell: Callable[[], None],
        kernel_log: Path,
        environment: dict[str, str],
        on_kernel: Callable[[int], None],
        folder: Path,
        start_timeout=60,
        **_,
    ):
        client = PapermillNotebookClient(
            nb_man,
            kernel_name=kernel_name,
            startup_timeout=start_timeout,
            timeout=None,
            # Not papermill's own cwd: it changes this process's.
            resources={"metadata": {"path": str(folder)}},
            # ipykernel 7.4 warns at every start that loopback traffic is not encrypted.
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
            on_cell_execute=lambda cell, cell_index: started(cell),
        )

        def started(cell) -> None:
            on_kernel(kernel_process(client).pid)
            # papermill adds a cell with the parameters that were given.
            if "injected-parameters" not in cell.metadata.get("tags", []):
                on_cell()

        with kernel_log.open("wb") as log, _Watchdog(client, timeout_seconds) as watchdog:
            try:
                return client.execute(env=os.environ | KERNEL_ENVIRONMENT | environment, stderr=log)
            except Exception as error:
                if watchdog.fired:
                    raise NotebookTimeout(
                        f"stopped after {timeout_seconds:g} seconds, its timeout_seconds"
                    ) from error
                raise


papermill_engines.register("glm4v-nb", SuiteEngine)


def count_code_cells(path: Path) -> int:
    """The number of code cells with something in them."""
    notebook = nbformat.read(path, as_version=4)
    return sum(cell.cell_type == "code" and bool(cell.source.strip()) for cell in notebook.cells)


def execute_notebook(
    entry: NotebookEntry,
    directory: Path,
    output: Path,
    on_cell: Callable[[int, int], None] = lambda cell, cells: None,
    parameters: dict | None = None,
    environment: dict[str, str] | None = None,
    on_kernel: Callable[[int], None] = lambda pid: None,
) -> NotebookResult:
    """Run directory/entry.file with `directory` as working directory; the executed copy goes to
    `output`.

    on_cell(cell, cells): called before each code cell, counted from 1. parameters: put in place of
    those of the notebook. environment: added to the kernel's. on_kernel(pid): called with the
    kernel's process before each code cell. A failing notebook is a result, not an exception;
    KeyboardInterrupt passes through.
    """
    source = directory / entry.file
    result = NotebookResult()
    # What the kernel process itself says, outside any cell; kept only if it said something.
    kernel_log = output.with_suffix(".kernel.log")
    started_cells = 0

    def count_cell() -> None:
        nonlocal started_cells
        started_cells += 1
        on_cell(started_cells, result.cells)

    start = time.monotonic()
    try:
        result.cells = count_code_cells(source)
        os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
        papermill.execute_notebook(
            # papermill formats paths like templates.
            str(source).replace("{", "{{").replace("}", "}}"),
            str(output).replace("{", "{{").replace("}", "}}"),
            engine_name="glm4v-nb",
            kernel_name=KERNEL_NAME,
            language="python",
            folder=directory,
            progress_bar=False,
            start_timeout=KERNEL_START_SECONDS,
            timeout_seconds=entry.timeout_seconds,
            on_cell=count_cell,
            kernel_log=kernel_log,
            parameters=parameters,
            environment=environment or {},
            on_kernel=on_kernel,
        )
        result.status = "done"
    except PapermillExecutionError as error:
        result.error = _one_line(f"{error.ename}: {error.evalue}")
        result.traceback = strip_color("\n".join(error.traceback))
    except NotebookTimeout as error:
        result.error, result.ending = str(error), "timeout"
    except DeadKernelError:
        result.ending = "killed"
        result.error = "kernel died (killed, out of memory, or a crash in native code)"
    except Exception as error:  # Whatever it was, the other notebooks still run.
        result.error = _one_line(f"{type(error).__name__}: {error}")
    finally:
        if kernel_log.exists() and kernel_log.stat().st_size == 0:
            kernel_log.unlink()
    result.seconds = round(time.monotonic() - start, 3)
    if result.status == "failed":
        result.failed_cell = started_cells or None
        repository = directory.parent
        result.error = without_private_paths(result.error, repository)
        if result.traceback:
            result.traceback = without_private_paths(result.traceback, repository)
    return result


def _one_line(text: str) -> str:
    lines = [line.strip() for line in strip_color(text).splitlines() if line.strip()]
    return lines[0] if lines else "unknown error"
