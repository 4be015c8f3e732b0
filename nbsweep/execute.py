"""Does one run, here or on another host: a kernel, the notebook's cells, and how it ended.

A run works in a scratch folder of its own and returns what it left; who asked for it writes that
down.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.metadata
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from papermill.exceptions import strip_color
from papermill.parameterize import parameterize_notebook

from .kernel import MARK, end_marked, kernel_manager, run_with_kernel, scratch_folder
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
from .store import RECORDS, RESULT_FILES, Outcome, OutOfMemoryCause, RunSpec, now

CAUSES = "nbsweep.causes"
WATCH_SECONDS = 0.2


class SourceChanged(RuntimeError):
    """What a run is named by is not what it would run, or has run; it counts as not run."""


class Stopped(RuntimeError):
    """Nobody waits for a run any more; its processes have been ended."""


class Link:
    """How a run that is being done is connected with whoever asked for it; here by memory.

    Attributes:
        at_cell: called with the number of a code cell, from 1, and how many there are.
        wanted: whether anybody waits for the run; asked a few times a second.
    """

    def __init__(self, at_cell: Callable[[int, int], None]):
        self.at_cell = at_cell
        self.wanted = True

    def begin(self) -> Path | None:
        """Called first, in the run's thread; where scratch folders may be, None for anywhere."""

    def stopped(self) -> Exception:
        """What to raise once the processes of an unwanted run have been ended."""
        return Stopped()


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


@dataclass(frozen=True)
class Ended:
    """How a run ended, and the files it left, by name."""

    outcome: Outcome
    files: dict[str, bytes]


def execute(job: Job, link: Link) -> Ended:
    """Do a run in this thread; a notebook that fails is a result, not an exception.

    Raises:
        SourceChanged: the packages are not, or no longer, those that the run is named by.
        OSError: this machine cannot do it, as with a full disk.
        Exception: ``link.stopped()``.
    """
    parent = link.begin()
    _check_packages(job)
    with scratch_folder(job.scratch, parent) as (scratch, mark):
        folder = job.folder
        if folder is None:
            folder = scratch / "notebooks"
            folder.mkdir()
            (folder / job.spec.notebook).write_bytes(job.notebook)
        started, begin = now(), time.monotonic()
        result = _run_cells(job, link, folder, scratch, mark)
        result["seconds"] = round(time.monotonic() - begin, 3)
        if not link.wanted:
            raise link.stopped()
        _check_packages(job)
        clean = functools.partial(without_private_paths, folders=(*job.private, scratch))
        for name in {"error", "traceback"} & result.keys():
            result[name] = clean(_encodable(result[name]))
        files = _files(result.pop("notebook", None), scratch, clean)
    return Ended(_outcome(job, started, result), files)


def _check_packages(job: Job):
    packages = job.registry.packages
    if (found := package_hash(packages)) != job.spec.package:
        raise SourceChanged(
            f"{', '.join(packages)}: the source is now {found}, expected {job.spec.package}"
        )


def _run_cells(job: Job, link: Link, folder: Path, scratch: Path, mark: str) -> dict:
    """Run the cells; returns what an ``Outcome`` says of it, and the notebook as it is then."""
    spec, begun = job.spec, 0
    notebook = _with_parameters(job)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    cells = len(code) - bool(spec.given)

    def at_cell(cell, cell_index):
        nonlocal begun
        if "injected-parameters" not in cell.metadata.get("tags", []):
            begun += 1
            link.at_cell(begun, cells)

    environment = {"OMP_NUM_THREADS": str(job.threads)} | os.environ | job.registry.environment
    environment |= {MARK: mark, RECORDS_VARIABLE: str(scratch.resolve() / RECORDS)}
    client = NotebookClient(
        notebook,
        km=kernel_manager(scratch),
        timeout=None,
        force_raise_errors=True,
        on_cell_execute=at_cell,
    )
    result = {"status": "done", "cells": cells}
    with _watch(mark, spec.timeout_seconds, link) as late:
        try:
            # In this very thread: a kernel dies with the thread that started it.
            with (scratch / "executed.kernel.log").open("wb") as log:
                kernel = {"env": environment, "stdout": log, "stderr": log, "cwd": str(folder)}
                asyncio.run(run_with_kernel(client, **kernel))
        except CellExecutionError as error:
            # As papermill has it: a notebook may end itself.
            if error.ename != "SystemExit" or error.evalue not in ("", "0"):
                result |= {"status": "failed", "error": _one_line(error.ename, error.evalue)}
                result["traceback"] = strip_color(error.traceback)
        except DeadKernelError:
            text = "kernel died (killed, out of memory, or a crash in native code)"
            result |= {"status": "killed", "error": text}
        except OSError:
            raise
        except Exception as error:
            # Not the notebook's own: its kernel did not start, or was killed as it did.
            text = _one_line(type(error).__name__, str(error))
            result |= {"status": "killed", "error": f"kernel did not start or answer: {text}"}
    if late.is_set() and result["status"] == "killed":
        text = f"stopped after {spec.timeout_seconds:g} seconds, its timeout_seconds"
        result |= {"status": "timeout", "error": text}
    if result["status"] != "done":
        result["failed_cell"] = begun or None
    return result | ({"notebook": notebook} if begun else {})


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
def _watch(mark: str, seconds: float, link: Link) -> Iterator[threading.Event]:
    """While a run goes on, end its processes once ``seconds`` have passed, which sets the event, or
    when it is unwanted."""
    ended, late = threading.Event(), threading.Event()
    deadline = time.monotonic() + seconds

    def watch():
        while not ended.wait(WATCH_SECONDS):
            if time.monotonic() > deadline:
                late.set()
            if late.is_set() or not link.wanted:
                end_marked(mark)

    watcher = threading.Thread(target=watch, name="watch a run", daemon=True)
    watcher.start()
    try:
        yield late
    finally:
        ended.set()
        watcher.join()


def _one_line(name: str, message: str) -> str:
    """An error as its type and the first line of its message that says something."""
    lines = [" ".join(line.split()) for line in strip_color(message or "").split("\n")]
    return f"{name}: {next(filter(None, lines), '')}".removesuffix(": ")


def _encodable(text: str) -> str:
    """A text without the halves of characters that file names and messages may hold."""
    return text.encode("utf-8", "replace").decode()


def _files(notebook, scratch: Path, clean: Callable[[str], str]) -> dict[str, bytes]:
    """What a run leaves beside its outcome, by name."""
    files = {}
    if notebook is not None:
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                _clean_output(output, clean)
        text = nbformat.writes(notebook)
        files["executed.ipynb"] = _encodable(text).encode()
        files["executed.html"] = _page(notebook)
    for name in (RECORDS, "executed.kernel.log"):
        if (scratch / name).is_file() and (content := (scratch / name).read_bytes()):
            files[name] = content
    if log := files.get("executed.kernel.log"):
        files["executed.kernel.log"] = clean(log.decode(errors="replace")).encode()
    return {name: files[name] for name in RESULT_FILES if files.get(name)}


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
        return _encodable(page).encode()
    except Exception:
        return b""


def _outcome(job: Job, started: str, result: dict) -> Outcome:
    """The class of a run's end, and for an error what groups it with others of the same cause."""
    status, error = result["status"], result.get("error")
    if error is not None:
        result["signature"] = signature_of(error)
        if status == "failed" and error.partition(":")[0].endswith("OutOfMemoryError"):
            cause = cause_of(error, result["traceback"])
            result |= {"status": "oom", "oom": cause}
            result["signature"] = f"out of memory in {cause.phase or 'an unnamed stage'}"
    return Outcome(
        started=started,
        versions=installed_versions(job.registry.libraries),
        platform=platform_description(),
        cards=gpu_names(),
        commit=commit_of(package_folder(job.registry.packages[0])),
        **result,
    )


def cause_of(error: str, traceback: str) -> OutOfMemoryCause:
    """Device, phase and bytes short of an out-of-memory error, as far as an installed package can
    read its text.

    Those packages are entry points of the group "nbsweep.causes": functions of the error's line and
    its traceback that return {"device", "phase", "short_bytes"}, or None.
    """
    for point in importlib.metadata.entry_points(group=CAUSES):
        # Whatever is wrong with that package, the run has ended.
        with contextlib.suppress(Exception):
            if found := point.load()(error, traceback):
                return OutOfMemoryCause(**found)
    return OutOfMemoryCause()


def signature_of(error: str) -> str:
    """The error without what differs between runs of the same cause: addresses, numbers, paths,
    quoted texts."""
    text = re.sub(r"0x[0-9a-fA-F]+", "0x…", error)
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "…", text)
    text = re.sub(r"(?<![\w.])[~.]?/[^\s:,)]+", "/…", text)
    return re.sub(r"\d+(?:[.,]\d+)*", "#", text)
