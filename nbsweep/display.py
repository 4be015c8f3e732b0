"""What a sweep looks like on a terminal while it runs, and one line for every run elsewhere."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .runner import Progress
from .store import FinishedRun, RunSpec
from .words import in_words

STYLES = {"done": "green", "oom": "magenta", "not run": "yellow"}
_LONGEST_TABLE = 16


def parameters_in_words(spec: RunSpec) -> str:
    """The parameters a sweep has set, "card=L4 count=2"."""
    return " ".join(f"{name}={spec.parameters[name]}" for name in spec.given)


def ending_in_words(run: FinishedRun) -> str:
    """Status and, if it is none of done, why."""
    outcome = run.outcome
    if outcome is None:
        return "not run"
    if outcome.oom:
        where = f"card {outcome.oom.device}" if outcome.oom.device is not None else "a card"
        return f"oom: {where}, {outcome.oom.phase or 'unnamed stage'}"
    return outcome.status if outcome.error is None else f"{outcome.status}: {outcome.error}"


class Display:
    """Shows a ``Progress``: a live table on a terminal, a line for each run that ends elsewhere and
    under CI."""

    def __init__(self, specs: Sequence[RunSpec], workers: int, console: Console):
        self._specs = {spec.id: spec for spec in specs}
        self._workers, self._console = workers, console
        self._said = 0
        self._seen: set[str] = set()
        self._begun = time.monotonic()
        self._known_before: int | None = None
        self._live = None
        if console.is_terminal and not os.environ.get("CI"):
            self._live = Live(console=console, transient=True, refresh_per_second=4)

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception):
        if self._live:
            self._live.stop()

    def show(self, progress: Progress):
        """Called by the sweep; prints what has ended since the last time and renews the table."""
        if self._known_before is None:
            self._known_before = len(progress.outcomes)
            self._seen.update(progress.outcomes)
            if self._known_before:
                hint = (
                    "; --force (make run: FORCE=1) repeats them"
                    if self._known_before == progress.total
                    else ""
                )
                self._console.print(
                    f"{self._known_before} of {progress.total} runs had ended before{hint}",
                    style="dim",
                )
        for note in progress.notes[self._said :]:
            self._console.print(escape(note), style="yellow", soft_wrap=True, highlight=False)
        self._said = len(progress.notes)
        for name in [name for name in progress.outcomes if name not in self._seen]:
            self._seen.add(name)
            run = FinishedRun(spec=self._specs[name], outcome=progress.outcomes[name], records=[])
            style = STYLES.get(run.outcome.status, "bold red")
            words = [
                run.spec.notebook,
                parameters_in_words(run.spec),
                f"{run.outcome.seconds:.1f} s",
            ]
            words += [ending_in_words(run)[:120]] if run.outcome.status != "done" else []
            self._console.print(
                f"[{style}]{run.outcome.status:>7}[/]  {escape('  '.join(filter(None, words)))}",
                soft_wrap=True,
                highlight=False,
            )
        if self._live:
            self._live.update(self._table(progress))

    def remaining_seconds(self, progress: Progress) -> float | None:
        """By the mean of the runs that ended while this was looking; None before the first has."""
        ended = len(progress.outcomes) - (self._known_before or 0)
        if not ended:
            return None
        each = (time.monotonic() - self._begun) / ended
        return each * (progress.total - len(progress.outcomes))

    def _table(self, progress: Progress) -> Group:
        table = Table("running", "parameters", "cell", "seconds", expand=False)
        for name, (cell, cells, began) in list(progress.running.items())[:_LONGEST_TABLE]:
            spec = self._specs[name]
            table.add_row(
                escape(spec.notebook),
                escape(parameters_in_words(spec)),
                f"{cell} of {cells}" if cells else "starting",
                f"{time.monotonic() - began:.0f}",
            )
        remaining = self.remaining_seconds(progress)
        left = "" if remaining is None else f" · about {remaining:.0f} s left"
        counts = ", ".join(f"{count} {status}" for status, count in sorted(progress.counts.items()))
        return Group(
            table, Text(f"{len(progress.outcomes)} of {progress.total} ended{left}  {counts}")
        )


def print_runs(runs: Sequence[FinishedRun], console: Console):
    """A table of all runs: parameters, how they ended, what they recorded."""
    counts = Counter(run.status for run in runs)
    title = ", ".join(f"{count} {status}" for status, count in counts.items())
    table = Table("notebook", "parameters", "ended", "seconds", "recorded", title=title)
    for run in runs:
        recorded = ", ".join(
            f"{each.name} {in_words(each.value, each.unit)}" for each in run.records[:3]
        )
        more = f", and {len(run.records) - 3} more" if len(run.records) > 3 else ""
        table.add_row(
            escape(run.spec.notebook),
            escape(parameters_in_words(run.spec)),
            f"[{STYLES.get(run.status, 'bold red')}]{escape(ending_in_words(run)[:160])}[/]",
            f"{run.outcome.seconds:.1f}" if run.outcome else "",
            escape(recorded + more),
        )
    console.print(table)
