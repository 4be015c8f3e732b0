"""Runs the registered notebooks, two at a time: `python -m glm4v_nb.experiment.run [--notebooks 01 02]`.

Exit codes: 0 every notebook is done, 1 one failed, 2 wrong use (an unknown number, a registry
that is not right), 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .engine import execute_notebook, kill_tree
from .registry import DEFAULT_REGISTRY, NotebookEntry, RegistryError, load_registry
from .report import render_notebook, write_report
from .summary import NotebookResult, RunSummary, installed_versions, platform_description

STATUS_STYLE = {"done": "green", "failed": "bold red", "not run": "yellow"}


def run_suite(
    notebooks: list[str] | None = None,
    output: Path | str = "runs",
    registry: Path | str = DEFAULT_REGISTRY,
    console: Console | None = None,
    workers: int = 2,
) -> tuple[RunSummary, Path]:
    """Execute notebooks and leave output/<time>/ with summary.json, index.html and the executed notebooks.

    notebooks: numbers such as ["01", "02"], or None for all. workers: how many at a time. Returns the summary and
    that folder. Raises RegistryError before anything runs. After KeyboardInterrupt the rest is "not run".
    """
    console = console or Console()
    registry = Path(registry).resolve()
    entries = load_registry(registry).select(notebooks)
    if not entries:
        raise RegistryError(f"{registry} lists no notebook; expected at least one. Add a [[notebook]] entry")
    directory = _new_directory(Path(output).resolve())
    start = time.monotonic()
    summary = RunSummary(
        started=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        versions=installed_versions(),
        platform=platform_description(),
        notebooks=[
            NotebookResult(file=entry.file, title=entry.title, status="not run", error="not reached")
            for entry in entries
        ],
    )
    kernels: dict[str, int] = {}
    stopping = threading.Event()

    def remember(entry: NotebookEntry, pid: int) -> None:
        kernels[entry.file] = pid
        if stopping.is_set():  # it was starting when the user interrupted
            kill_tree(pid)

    def execute(entry: NotebookEntry) -> NotebookResult:
        label = f"{entry.number} {entry.title}"
        announce(label, 0, 0)
        result = execute_notebook(
            entry,
            registry.parent,
            directory / entry.file,
            on_cell=lambda cell, cells: announce(label, cell, cells),
            on_kernel=lambda pid: remember(entry, pid),
        )
        kernels.pop(entry.file, None)
        return result

    with _progress(console, len(entries)) as (announce, finished), ThreadPoolExecutor(workers) as pool:
        positions = {pool.submit(execute, entry): position for position, entry in enumerate(entries)}
        try:
            for future in as_completed(positions):
                result = future.result()
                result.rendered = render_notebook(directory, result.executed)
                summary.notebooks[positions[future]] = result
                summary.seconds = round(time.monotonic() - start, 3)
                finished(result)
                summary.write(directory)
                write_report(summary, directory)
        except KeyboardInterrupt:
            running = [future for future in positions if future.running() or future.done()]
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for pid in list(kernels.values()):
                kill_tree(pid)
            for future in running:
                if summary.notebooks[positions[future]].status == "not run":
                    summary.notebooks[positions[future]].error = "interrupted"
    summary.seconds = round(time.monotonic() - start, 3)
    summary.write(directory)
    write_report(summary, directory)
    return summary, directory


def print_summary(summary: RunSummary, directory: Path, console: Console) -> None:
    """A table of the results and the path of the report to open."""
    table = Table(title=f"{summary.count('done')} of {len(summary.notebooks)} notebooks done")
    for column in ("notebook", "status", "seconds", "error"):
        table.add_column(column, overflow="fold", justify="right" if column == "seconds" else "left")
    for result in summary.notebooks:
        where = f"cell {result.failed_cell}: " if result.failed_cell else ""
        table.add_row(
            escape(result.file),
            f"[{STATUS_STYLE[result.status]}]{result.status}[/]",
            f"{result.seconds:.1f}",
            escape(where + result.error) if result.error else "",
        )
    console.print(table)
    console.print(f"Open {escape(_shown(directory / 'index.html'))}", soft_wrap=True, highlight=False)


def _shown(path: Path) -> str:
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def _new_directory(output: Path) -> Path:
    """output/<local time>, with -2, -3, … when two runs start in one second."""
    stamp = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    for attempt in range(1, 1000):
        directory = output / (stamp if attempt == 1 else f"{stamp}-{attempt}")
        with contextlib.suppress(FileExistsError):
            directory.mkdir(parents=True)
            return directory
    raise OSError(f"{output} has too many runs of {stamp}; remove some")


Announce = Callable[[str, int, int], None]
Finished = Callable[[NotebookResult], None]


@contextlib.contextmanager
def _progress(console: Console, total: int) -> Iterator[tuple[Announce, Finished]]:
    """One live line on a terminal; one plain line per notebook elsewhere and under CI."""

    def line(result: NotebookResult) -> None:
        where = f", cell {result.failed_cell}: {result.error}" if result.error else ""
        style = STATUS_STYLE[result.status]
        console.print(
            f"[{style}]{result.status:>7}[/]  {escape(result.file)}  {result.seconds:.1f} s{escape(where)}",
            soft_wrap=True,
            highlight=False,
        )

    if not console.is_terminal or os.environ.get("CI"):
        yield lambda label, cell, cells: None, line
        return
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task("starting", total=total)

        def announce(label: str, cell: int, cells: int) -> None:
            bar.update(task, description=f"{label} · cell {cell} of {cells}" if cells else label)

        def finished(result: NotebookResult) -> None:
            line(result)
            bar.advance(task)

        yield announce, finished


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m glm4v_nb.experiment.run", description="Run the registered notebooks in order."
    )
    parser.add_argument("--notebooks", nargs="+", metavar="NUMBER", help="such as 01 02 (default: all)")
    parser.add_argument("--output", default="runs", help="folder that receives <time>/ (default: runs)")
    parser.add_argument("--registry", default=DEFAULT_REGISTRY, help="another registry.toml")
    parser.add_argument("--workers", type=int, default=2, help="notebooks at a time (default: 2)")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        summary, directory = run_suite(
            options.notebooks, options.output, options.registry, console, max(1, options.workers)
        )
    except RegistryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_summary(summary, directory, console)
    return summary.exit_code


if __name__ == "__main__":
    sys.exit(main())
