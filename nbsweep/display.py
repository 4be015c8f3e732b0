"""What a sweep looks like on a terminal while it runs, and one line for every run elsewhere."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as BarsOfRich
from rich.table import Table
from rich.text import Text

from .plan import Plan, predict
from .runner import Progress
from .store import FinishedRun, Outcome, RunSpec
from .words import in_words

STYLES = {"done": "green", "oom": "magenta", "not run": "yellow"}


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
    """Shows a ``Progress``: bars on a terminal, and a line for each run that ends; under CI and
    elsewhere the lines alone."""

    def __init__(self, specs: Sequence[RunSpec], console: Console):
        self._specs = {spec.id: spec for spec in specs}
        self._console = console
        self._notes_said = 0
        self._seen: set[str] | None = None
        self._bars = BarsOfRich(
            TextColumn("{task.description}", markup=False),
            BarColumn(24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal or bool(os.environ.get("CI")),
        )
        self._all = self._bars.add_task("all runs", total=len(specs))
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(self, *exception):
        self._bars.stop()

    def show(self, progress: Progress):
        """Called by the sweep; prints what has ended since the last time and renews the bars."""
        if self._seen is None:
            self._seen = set(progress.outcomes)
            if self._seen:
                words = f"{len(self._seen)} of {progress.total} runs had ended before"
                if len(self._seen) == progress.total:
                    words += "; --force (make run: FORCE=1) repeats them"
                self._print(Text(words, style="dim"))
        for note in progress.notes[self._notes_said :]:
            self._print(Text(note, style="yellow"))
        self._notes_said = len(progress.notes)
        for name in [name for name in progress.outcomes if name not in self._seen]:
            self._seen.add(name)
            self._print_ended(self._specs[name], progress.outcomes[name])
        self._renew_bars(progress)

    def _print(self, text: Text):
        self._console.print(text, soft_wrap=True)

    def _print_ended(self, spec: RunSpec, outcome: Outcome):
        run = FinishedRun(spec=spec, outcome=outcome, records=[])
        words = [spec.notebook, parameters_in_words(spec), f"{outcome.seconds:.1f} s"]
        words += [ending_in_words(run)[:120]] if outcome.status != "done" else []
        status = Text(f"{outcome.status:>7}", style=STYLES.get(outcome.status, "bold red"))
        self._print(status + "  " + "  ".join(filter(None, words)))

    def _renew_bars(self, progress: Progress):
        for name in progress.running.keys() - self._tasks.keys():
            words = f"{self._specs[name].notebook} {parameters_in_words(self._specs[name])}"
            self._tasks[name] = self._bars.add_task(words, total=None)
        for name in self._tasks.keys() - progress.running.keys():
            self._bars.remove_task(self._tasks.pop(name))
        for name, (cell, cells) in progress.running.items():
            self._bars.update(self._tasks[name], completed=cell, total=cells or None)
        counts = ", ".join(f"{count} {status}" for status, count in sorted(progress.counts.items()))
        ended = len(progress.outcomes)
        self._bars.update(self._all, completed=ended, description=f"all runs  {counts}")


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


def print_plan(plan: Plan, workers: int, as_json: bool):
    """What a sweep would do: its runs, about how long, and what is predicted of them."""
    predicted = predict(plan.specs)
    if as_json:
        runs = [spec.model_dump() | {"predicted": predicted.get(spec.id)} for spec in plan.specs]
        print(json.dumps({"name": plan.name, "minutes": plan.minutes, "runs": runs}, indent=2))
        return
    table = Table("notebook", "parameters", "predicted", title=f"sweep {plan.name}")
    for spec in plan.specs:
        words = predicted.get(spec.id, "")
        cells = map(escape, (spec.notebook, parameters_in_words(spec), words))
        table.add_row(*cells, style="magenta" if words.startswith("does not") else None)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{len(plan.specs)} runs, about {plan.minutes / workers:.1f} minutes with {workers} at a"
        " time, by the registry. Nothing was run; leave out --dry-run to begin."
    )
