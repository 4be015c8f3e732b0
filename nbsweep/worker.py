"""A process that does runs, one after the other: `python -m nbsweep.worker SWEEP NOTEBOOKS`.

It reads the ids of runs from its standard input and writes lines to its standard output: "cell N
OF" as a run goes on, then "ended done", "ended not-written REASON" or "ended busy" (another process
has the run). A run ends with its outcome written, whole, or with none at all. If whoever started
the worker dies, it ends too and takes the kernel along.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

from .engine import execute_notebook, kill_tree
from .files import locked, write_whole
from .outcome import Outcome, OutOfMemoryCause, RunSpec
from .records import RECORDS_VARIABLE
from .registry import NotebookEntry
from .rendering import render_notebook
from .result import NotebookResult, commit_of, gpu_names, installed_versions, platform_description
from .specs import PACKAGE

ENDED, NOT_WRITTEN, BUSY = "done", "not-written", "busy"
# How long a worker of a runner that was killed may take to be gone.
LOCK_SECONDS = 20.0
KERNEL_FILE = "kernel.pid"
# What a run leaves in its folder, beside its outcome.
RESULT_FILES = ("executed.ipynb", "executed.html", "records.jsonl", "executed.kernel.log")


def perform(sweep: Path, run_id: str, notebooks: Path) -> str:
    """Do a run, unless it has ended already; returns what to say of it."""
    folder = sweep / run_id
    try:
        with locked(folder / "lock", LOCK_SECONDS):
            if (folder / "outcome.json").exists():
                return ENDED
            spec = RunSpec.model_validate_json((folder / "spec.json").read_text(encoding="utf-8"))
            write_whole(
                folder / "outcome.json",
                _run(spec, folder, notebooks).model_dump_json(indent=2) + "\n",
            )
            return ENDED
    except BlockingIOError:
        return BUSY
    except OSError as error:
        return f"{NOT_WRITTEN} {error}"


def _run(spec: RunSpec, folder: Path, notebooks: Path) -> Outcome:
    # An earlier try was killed in the middle; what it left belongs to no outcome.
    for name in (*RESULT_FILES, KERNEL_FILE):
        (folder / name).unlink(missing_ok=True)
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    entry = NotebookEntry.model_construct(
        file=spec.notebook, title=spec.title, timeout_seconds=spec.timeout_seconds
    )
    result = execute_notebook(
        entry,
        notebooks,
        folder / "executed.ipynb",
        on_cell=lambda cell, cells: print(f"cell {cell} {cells}", flush=True),
        parameters={name: spec.parameters[name] for name in spec.given},
        environment={RECORDS_VARIABLE: str((folder / "records.jsonl").resolve())},
        on_kernel=lambda pid: (folder / KERNEL_FILE).write_text(str(pid), encoding="utf-8"),
    )
    render_notebook(folder / "executed.ipynb")
    return outcome_of(result, started)


def outcome_of(result: NotebookResult, started: str) -> Outcome:
    """The class of a notebook's end, and for an error what groups it with others of the same
    cause."""
    error = result.error or "unknown error"
    status, cause, signature = "done", None, None
    if result.status != "done":
        status, signature = result.ending or "failed", signature_of(error)
        if error.partition(":")[0].endswith("OutOfMemoryError"):
            status, cause = "oom", cause_of(error, result.traceback or "")
            signature = f"out of memory in {cause.phase or 'an unnamed stage'}"
    return Outcome(
        status=status,
        started=started,
        seconds=result.seconds,
        cells=result.cells,
        failed_cell=result.failed_cell,
        error=result.error,
        signature=signature,
        traceback=result.traceback,
        oom=cause,
        versions=installed_versions(),
        platform=platform_description(),
        cards=gpu_names(),
        commit=commit_of(PACKAGE),
    )


def cause_of(error: str, traceback: str) -> OutOfMemoryCause:
    """Device, phase and bytes short of an out-of-memory error, as far as its text tells."""
    from simgpu.oom import parse_out_of_memory

    # A rig's stage adds this note, which stands behind the message; before it are lines of code.
    _, found, notes = traceback.rpartition("out of memory")
    phase = re.search(r"in the stage \"([^\"]+)\"", notes) if found else None
    try:
        message = parse_out_of_memory(error)
    except ValueError:
        return OutOfMemoryCause(device=None, phase=phase and phase[1], short_bytes=None)
    return OutOfMemoryCause(
        device=message.device, phase=phase and phase[1], short_bytes=message.short_bytes
    )


def signature_of(error: str) -> str:
    """The error without what differs between runs of the same cause: addresses, numbers, paths,
    quoted texts."""
    text = re.sub(r"0x[0-9a-fA-F]+", "0x…", error)
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "…", text)
    text = re.sub(r"(?<![\w.])[~.]?/[^\s:,)]+", "/…", text)
    return re.sub(r"\d+(?:[.,]\d+)*", "#", text)


def follow_parent(kernels: dict[str, Path]):
    """End this process and its kernel when its parent is gone, or when it is asked to end.

    ``kernels`` has the folder of the run that is being done, under "folder".
    """
    parent = os.getppid()

    def leave(*_):
        if "folder" in kernels:
            kill_kernel(kernels["folder"])
        os._exit(1)

    def watch():
        while os.getppid() == parent:
            time.sleep(0.3)
        leave()

    signal.signal(signal.SIGTERM, leave)
    # The runner decides what an interrupt means; a terminal sends it to all.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, name="follow parent", daemon=True).start()


def kill_kernel(folder: Path):
    """End the kernel that a run's folder names, if it is still there."""
    try:
        pid = int((folder / KERNEL_FILE).read_text(encoding="utf-8"))
        command = " ".join(psutil.Process(pid).cmdline())
    except (OSError, ValueError, psutil.Error):
        return
    if "ipykernel" in command:  # and not another process that was given the number since
        kill_tree(pid)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("notebooks", type=Path)
    options = parser.parse_args(arguments)
    current: dict[str, Path] = {}
    follow_parent(current)
    for line in sys.stdin:
        current["folder"] = options.sweep / line.strip()
        print("ended", perform(options.sweep, line.strip(), options.notebooks), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
