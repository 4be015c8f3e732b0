"""Does one run, here or on another host: a kernel, the notebook's cells, and how it ended.

A run works in a scratch folder of its own and returns what it left; who asked for it writes that
down.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from papermill.parameterize import parameterize_notebook

from .errors import explain, one_line, signature_of
from .kernel import (
    CONNECTION_FILE,
    MARK,
    end_marked,
    kernel_manager,
    run_with_kernel,
    scratch_folder,
)
from .provenance import (
    commit_of,
    gpu_names,
    installed_versions,
    package_folder,
    package_hash,
    platform_description,
    without_private_paths,
)
from .records import RECORDS_VARIABLE
from .registry import Registry
from .store import RECORDS, RESULT_FILES, Outcome, RunSpec, Status, now, parse_records
from .words import whole_characters

WATCH_SECONDS = 0.2
START_TRIES = 3
# What a kernel says as it ends.
PORT_TAKEN = b"Address already in use"


class SourceChanged(RuntimeError):
    """What a run is named by is not what it would run, or has run; it counts as not run."""


class Stopped(RuntimeError):
    """Nobody waits for a run any more; its processes have been ended."""


@dataclass(frozen=True)
class Job:
    """A run with all that is needed to do it.

    Attributes:
        notebook: the file's bytes.
        folder: where the notebook is, and is run; None on a host that does not have it.
        scratch: what the run may fill and remove; None where the host is to choose.
        threads: that its kernel may compute with, unless OMP_NUM_THREADS is set.
        registry: of the notebook: packages, libraries and environment count.
        private: folders whose paths are left out of what the run leaves.
    """

    spec: RunSpec
    notebook: bytes
    folder: Path | None
    scratch: Path | None
    threads: int
    registry: Registry
    private: tuple[Path, ...] = ()


# How a run ended, and the files it left, by name.
Ended = tuple[Outcome, dict[str, bytes]]


def execute(
    job: Job,
    at_cell: Callable[[int, int], None],
    wanted: Callable[[], bool],
    parent: Path | None = None,
) -> Ended:
    """Do a run in this thread; a notebook that fails is a result, not an exception.

    Args:
        at_cell: called with the number of a code cell, from 1, and how many there are.
        wanted: whether anybody waits for the run; asked a few times a second.
        parent: where scratch folders may be; None for anywhere.

    Raises:
        SourceChanged: the packages are not, or no longer, those that the run is named by.
        OSError: this machine cannot do it, as with a full disk.
        Stopped: it is not wanted.
    """
    _check_packages(job)
    with scratch_folder(job.scratch, parent) as (scratch, mark):
        folder = job.folder
        if folder is None:
            folder = scratch / "notebooks"
            folder.mkdir()
            (folder / job.spec.notebook).write_bytes(job.notebook)
        started, begin = now(), time.monotonic()
        clean = functools.partial(_shareable, folders=(*job.private, scratch))
        with _watch(mark, job.spec.timeout_seconds, wanted) as late:
            notebook, result = _run_cells(job, at_cell, folder, scratch, mark, clean)
        if late.is_set() and result["status"] == "killed":
            text = f"stopped after {job.spec.timeout_seconds:g} seconds, its timeout_seconds"
            result |= {"status": "timeout", "error": text}
        seconds = round(time.monotonic() - begin, 3)
        if not wanted():
            raise Stopped
        _check_packages(job)
        files = _files(notebook, scratch, clean)
        if problem := _broken_records(files, result["status"]):
            result |= {"status": "failed", "error": problem}
    about = {
        "signature": signature_of(result["error"]) if "error" in result else None,
        "versions": installed_versions(job.registry.libraries),
        "platform": platform_description(),
        "cards": gpu_names(),
        "commit": commit_of(package_folder(job.registry.packages[0])),
    }
    return Outcome(**about | result, started=started, seconds=seconds), files


def _shareable(text: str, folders: Sequence[Path]) -> str:
    return without_private_paths(whole_characters(text), folders)


def _check_packages(job: Job):
    packages = job.registry.packages
    if (found := package_hash(packages)) != job.spec.package:
        raise SourceChanged(
            f"{', '.join(packages)}: the source is now {found}, expected {job.spec.package}"
        )


def _run_cells(
    job: Job,
    at_cell: Callable[[int, int], None],
    folder: Path,
    scratch: Path,
    mark: str,
    clean: Callable[[str], str],
) -> tuple[nbformat.NotebookNode | None, dict]:
    """Run the cells; returns the notebook as it is then, if one was begun, and what an ``Outcome``
    says of it."""
    notebook, begun = _with_parameters(job), 0
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    result = {"status": "done", "cells": len(code) - bool(job.spec.given)}

    def begin(cell, cell_index):
        nonlocal begun
        if "injected-parameters" not in cell.metadata.get("tags", []):
            begun += 1
            at_cell(begun, result["cells"])

    environment = {"OMP_NUM_THREADS": str(job.threads)} | os.environ | job.registry.environment
    environment |= {MARK: mark, RECORDS_VARIABLE: str(scratch.resolve() / RECORDS)}
    options = {"timeout": None, "force_raise_errors": True, "on_cell_execute": begin}
    kernel = {"env": environment, "cwd": str(folder)}
    try:
        _in_kernel(notebook, scratch, options, kernel)
    except CellExecutionError as error:
        # As papermill has it: a notebook may end itself.
        if error.ename != "SystemExit" or error.evalue not in ("", "0"):
            texts = map(clean, (error.ename, error.evalue or "", error.traceback))
            result |= explain(*texts)
    except DeadKernelError:
        text = "kernel died (killed, out of memory, or a crash in native code)"
        result |= {"status": "killed", "error": text}
    except OSError:
        raise
    except Exception as error:
        # Not the notebook's own: its kernel did not start, or was killed as it did.
        text = clean(one_line(type(error).__name__, str(error)))
        result |= {"status": "killed", "error": f"kernel did not start or answer: {text}"}
    if result["status"] != "done":
        result["failed_cell"] = begun or None
    return notebook if begun else None, result


def _in_kernel(notebook: nbformat.NotebookNode, scratch: Path, options: dict, kernel: dict):
    """Run the cells in a kernel that is started for them, in this very thread: it dies with the
    thread that started it.

    Its ports are chosen before it takes them, and another process may be faster; then it is started
    again with others.
    """
    log = scratch / "executed.kernel.log"
    for tries_left in reversed(range(START_TRIES)):
        client = NotebookClient(notebook, km=kernel_manager(scratch), **options)
        try:
            with log.open("wb") as file:
                return asyncio.run(run_with_kernel(client, **kernel, stdout=file, stderr=file))
        except RuntimeError:
            if not tries_left or PORT_TAKEN not in log.read_bytes():
                raise
            (scratch / CONNECTION_FILE).unlink(missing_ok=True)


def _with_parameters(job: Job) -> nbformat.NotebookNode:
    notebook = nbformat.v4.upgrade(nbformat.reads(job.notebook.decode(), as_version=4))
    if given := {name: job.spec.parameters[name] for name in job.spec.given}:
        # papermill looks for these, and notes there what it injects.
        notebook.metadata["papermill"] = {}
        for cell in notebook.cells:
            cell.metadata.setdefault("tags", [])
        notebook = parameterize_notebook(notebook, given, kernel_name="python3", language="python")
    notebook.metadata.pop("papermill", None)
    return notebook


@contextlib.contextmanager
def _watch(mark: str, seconds: float, wanted: Callable[[], bool]) -> Iterator[threading.Event]:
    """While a run goes on, end its processes once ``seconds`` have passed, which sets the event, or
    when it is unwanted."""
    ended, late = threading.Event(), threading.Event()
    deadline = time.monotonic() + seconds

    def watch():
        while not ended.wait(WATCH_SECONDS):
            if time.monotonic() > deadline:
                late.set()
            if late.is_set() or not wanted():
                end_marked(mark)

    watcher = threading.Thread(target=watch, name="watch a run", daemon=True)
    watcher.start()
    try:
        yield late
    finally:
        ended.set()
        watcher.join()


def _files(notebook, scratch: Path, clean: Callable[[str], str]) -> dict[str, bytes]:
    """What a run leaves beside its outcome, by name."""
    files = {}
    if notebook is not None:
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                _clean_output(output, clean)
        text = nbformat.writes(notebook)
        files["executed.ipynb"] = whole_characters(text).encode()
        files["executed.html"] = _page(notebook)
    for name in (RECORDS, "executed.kernel.log"):
        if (scratch / name).is_file() and (content := (scratch / name).read_bytes()):
            files[name] = content
    if log := files.get("executed.kernel.log"):
        files["executed.kernel.log"] = clean(log.decode(errors="replace")).encode()
    return {name: files[name] for name in RESULT_FILES if files.get(name)}


def _broken_records(files: dict[str, bytes], status: Status) -> str | None:
    """What is wrong with a run's records, which are not kept then."""
    content = files.get(RECORDS, b"")
    if status != "done":  # it may have been ended in the middle of a line
        content = content[: content.rfind(b"\n") + 1]
    try:
        parse_records(content)
    except ValueError as error:
        del files[RECORDS]
        return f"no figures are kept: {error}"
    if content:
        files[RECORDS] = content
    return None


def _clean_output(output: nbformat.NotebookNode, clean: Callable[[str], str]):
    """Take the paths of this machine out of an output's texts; pictures have none."""
    for name in {"text", "evalue"} & output.keys():
        output[name] = clean(output[name])
    if "traceback" in output:
        output["traceback"] = [clean(line) for line in output["traceback"]]
    for kind, content in output.get("data", {}).items():
        if not isinstance(content, str):
            output["data"][kind] = json.loads(clean(json.dumps(content)))
        elif kind.startswith("text/") or kind.endswith("xml"):
            output["data"][kind] = clean(content)


def _page(notebook: nbformat.NotebookNode) -> bytes:
    """A notebook as a page to read that asks nothing of other places; none where it cannot be
    rendered: a run without that page is better than one that stops."""
    from nbconvert import HTMLExporter

    elsewhere = {name: "" for name in HTMLExporter.class_trait_names() if name.endswith("_url")}
    try:
        exporter = HTMLExporter(template_name="lab", embed_images=True, **elsewhere)
        page, _ = exporter.from_notebook_node(
            notebook, resources={"metadata": {"name": "executed"}}
        )
        return whole_characters(page).encode()
    except Exception:
        return b""
