"""The report of a sweep: ``report.html`` (one self-contained page), ``runs.csv`` and
``runs.parquet`` in its folder, and what changed between two sweeps.

Every file is written whole: a reader never sees half of one.
"""

from __future__ import annotations

import json
import math
import secrets
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_args

import jinja2

from .compare import by_parameters, compare
from .provenance import DISTRIBUTION
from .store import FinishedRun, Outcome, OutOfMemoryCause, Status, Value, read_sweep, write_whole
from .tables import Column, csv_bytes, distinct, parquet_bytes, runs_columns, runs_table, status_of
from .words import is_number, shortened, unit_for

STATUSES = (*get_args(Status), "unfinished")
LONGEST_CELL = 1_000
NO_PARQUET = (
    "runs.parquet was not written: pyarrow is not installed. Run `pip install pyarrow`, then report"
    " again."
)
_HERE = Path(__file__).parent
# Autoescaping is on for every value: titles, parameters and errors are text written by notebooks.
_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_HERE),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


def write_report(directory: Path | str) -> Path:
    """Write report.html, runs.csv and, where pyarrow is installed, runs.parquet; returns the path
    of report.html.

    Without pyarrow a sentence that says how to get it is printed, and stands on the page.

    Raises:
        FileNotFoundError, ValueError: as ``read_sweep``.
    """
    directory = Path(directory)
    sweep, runs = read_sweep(directory)
    table = runs_table(runs)
    write_whole(directory / "runs.csv", csv_bytes(table))
    parquet = parquet_bytes(table)
    if parquet is None:
        (directory / "runs.parquet").unlink(missing_ok=True)  # of an earlier report, no longer true
        print(NO_PARQUET, file=sys.stderr)
    else:
        write_whole(directory / "runs.parquet", parquet)
    for problem in filter(None, (run.problem for run in runs)):
        print(f"{problem}. The report counts it as unfinished; sweep again.", file=sys.stderr)
    counts = Counter(status_of(run) for run in runs)
    outcomes = [run.outcome for run in runs if run.outcome]
    given = distinct(name for run in runs for name in run.spec.given)
    failures = _failures(runs, given)
    return _write_page(
        directory / "report.html",
        kind="sweep",
        title=sweep.name,
        headline=f"{counts['done']:,} of {len(runs):,} runs done",
        sweep=sweep,
        runs=runs,
        counts={status: counts[status] for status in STATUSES},
        seconds=sum(outcome.seconds for outcome in outcomes),
        platforms=Counter(outcome.platform for outcome in outcomes if outcome.platform),
        versions=_versions(runs, outcomes),
        no_parquet=NO_PARQUET if parquet is None else None,
        failures=failures,
        frontier=_has_frontier(runs, given),
        **_table(_page_columns(runs, given, failures), [_facts(run, directory) for run in runs]),
    )


def write_comparison(
    directory_a: Path | str, directory_b: Path | str, path: Path | str, tolerance: float = 0.01
) -> Path:
    """Write ``compare`` as one self-contained page to ``path``, replacing an earlier one whole;
    returns the path.

    Raises:
        FileNotFoundError, ValueError: as ``compare``.
    """
    changes = compare(directory_a, directory_b, tolerance)
    (sweep_a, runs_a), (sweep_b, runs_b) = read_sweep(directory_a), read_sweep(directory_b)
    given = distinct(name for run in [*runs_a, *runs_b] for name in run.spec.given)
    matched = by_parameters(runs_a).keys() & by_parameters(runs_b).keys()
    names = ["what", "notebook", *given, "scalar", "unit", "before", "after", "change"]
    rows = []
    for change in changes:
        unit, size = unit_for(change.unit, [change.before, change.after])
        row = [change.kind, change.notebook, *map(change.parameters.get, given)]
        row += [change.name or None, unit or None]
        row += [_scaled(change.before, size), _scaled(change.after, size)]
        rows.append([*row, None if change.relative is None else 100 * change.relative])
    columns = [Column(name, "run", [row[i] for row in rows]) for i, name in enumerate(names)]
    columns[-3].labels = [change.before_label for change in changes]
    columns[-2].labels = [change.after_label for change in changes]
    columns[-1].unit = "%"
    changed = len({(change.notebook, json.dumps(change.parameters)) for change in changes})
    return _write_page(
        Path(path),
        kind="comparison",
        title=f"{sweep_a.name} and {sweep_b.name}",
        headline=f"{_count(len(changes), 'difference')} at {_count(changed, 'run')}",
        sweeps=[(sweep_a, len(runs_a)), (sweep_b, len(runs_b))],
        matched=len(matched),
        tolerance=tolerance,
        **_table(columns, [{} for _ in changes]),
    )


def _page_columns(
    runs: Sequence[FinishedRun], given: Sequence[str], failures: list[dict]
) -> list[Column]:
    """What the page shows of ``runs_columns``, and which failure a run belongs to."""
    columns = {(column.name, column.group): column for column in runs_columns(runs)}
    failure = {index: each["tag"] for each in failures for index in each["runs"]}
    seconds = columns["seconds", "clock"]
    seconds.labels = ["measured, wall clock" if run.outcome else None for run in runs]
    columns["id", "run"].name = "run"
    return [
        *(columns[name, "run"] for name in ("id", "notebook", "status")),
        Column("failure", "run", [failure.get(index) for index in range(len(runs))]),
        seconds,
        *(columns[name, "parameter"] for name in given),
        *(column for column in columns.values() if column.group == "scalar"),
        columns["error", "run"],
    ]


def _facts(run: FinishedRun, directory: Path) -> dict[str, Any]:
    """What the page knows of a run beside its cells.

    What it needs of a card is the most that it recorded under names that begin with "needs";
    without one, its out-of-memory error gives a lower bound.
    """
    cause = run.outcome and run.outcome.oom
    known = [
        each for each in run.records if each.name.startswith("needs") and is_number(each.value)
    ]
    recorded = max((each.value for each in known if each.unit == "bytes"), default=0)
    bound = (cause and cause.needs_bytes) or 0
    return {
        "oom": cause and _short(cause, recorded),
        "needs_gib": max(recorded, bound) / 2**30 or None,
        "at_least": recorded < bound,
        "executed": (directory / run.spec.id / "executed.html").is_file(),
    }


def _has_frontier(runs: Sequence[FinishedRun], given: Sequence[str]) -> bool:
    """Whether some runs fit and some do not, along a number and another parameter."""
    values = [[run.spec.parameters.get(name) for run in runs] for name in given]
    numbers = [each for each in values if len(set(filter(is_number, each))) > 1]
    varied = [each for each in values if len({json.dumps(one) for one in each} - {"null"}) > 1]
    both = {"done", "oom"} <= {status_of(run) for run in runs}
    return both and bool(numbers) and len(varied) > 1


def _table(columns: Sequence[Column], facts: list[dict]) -> dict[str, list]:
    """Columns as the page wants them, and rows of cells as JSON takes them, with what else is known
    of each.

    A column is hidden where it says nothing, and has a label where all its cells have the same.
    """
    described, rows = [], [{"cells": [], "labels": {}} | each for each in facts]
    for index, column in enumerate(columns):
        unit, size = unit_for(column.unit, column.values)
        for row, value, label in zip_longest(rows, column.values, column.labels):
            row["cells"].append(_plain(_scaled(value, size)))
            row["labels"] |= {index: label} if label else {}
        found = distinct(row["cells"][index] for row in rows if row["cells"][index] is not None)
        labels = set(filter(None, column.labels))
        about = {"index": index, "name": column.name, "group": column.group, "unit": unit}
        about["numeric"] = bool(found) and all(map(is_number, found))
        about["label"] = labels.pop() if len(labels) == 1 else None
        alone = (column.name, column.group) == ("notebook", "run") and len(found) == 1
        described.append(about | {"hidden": not found or alone})
    return {"columns": described, "rows": rows}


def _plain(value: Value | None) -> Value | None:
    """A value that JSON has a word for, a long text without its middle."""
    if isinstance(value, list) or (isinstance(value, float) and not math.isfinite(value)):
        value = json.dumps(value)
    return _brief(value) if isinstance(value, str) else value


def _brief(text: str) -> str:
    return shortened(text, LONGEST_CELL, "runs.csv")


def _failures(runs: Sequence[FinishedRun], given: Sequence[str]) -> list[dict[str, Any]]:
    """Runs that did not end well by the signature of their error, the commonest first, and what
    only they share."""
    groups: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        if run.outcome and run.outcome.status != "done":
            cause = run.outcome.signature or run.outcome.error or run.outcome.status
            groups.setdefault(cause, []).append(index)
    failures = []
    for cause, members in sorted(groups.items(), key=lambda group: -len(group[1])):
        first, shared = runs[members[0]], {}
        for name in filter(first.spec.parameters.__contains__, given):
            values = [json.dumps(run.spec.parameters.get(name)) for run in runs]
            if len({values[index] for index in members}) == 1 < len(set(values)):
                shared[name] = first.spec.parameters[name]
        failure = {"tag": f"F{len(failures) + 1}", "signature": cause, "runs": members}
        failure["statuses"] = distinct(status_of(runs[index]) for index in members)
        failures.append(failure | {"example": first.outcome, "shared": shared})
    return failures


def _versions(runs: Sequence[FinishedRun], outcomes: list[Outcome]) -> dict[str, Counter]:
    """Package → version → in how many runs, the notebooks' own first, by number and hash; then
    commit and GPUs."""
    found = {DISTRIBUTION: Counter(f"{run.spec.version} ({run.spec.package[:12]})" for run in runs)}
    for outcome in outcomes:
        for name, version in outcome.versions.items():
            if name.replace("_", "-") != DISTRIBUTION:
                found.setdefault(name, Counter())[version] += 1
    found["commit"] = Counter(outcome.commit or "unknown" for outcome in outcomes)
    found["GPUs"] = Counter(_gpus(outcome.cards) for outcome in outcomes)
    return found


def _gpus(names: list[str] | None) -> str:
    return "unknown" if names is None else "; ".join(names) or "none"


def _scaled(value: Value | None, size: int) -> Value | None:
    return value / size if size > 1 and is_number(value) else value


def _short(cause: OutOfMemoryCause, recorded: float) -> str:
    """Where a run ran out of memory, as words."""

    def size(number: int | None) -> str:
        unit, size = unit_for("bytes", [number])
        return "unknown bytes" if number is None else f"{_show(_scaled(number, size))} {unit}"

    device = "unknown device" if cause.device is None else f"GPU {cause.device}"
    needs = ""
    if recorded or cause.needs_bytes:
        at_least = recorded < (cause.needs_bytes or 0)
        needs = f"needs {'at least ' * at_least}{size(max(recorded, cause.needs_bytes or 0))}, "
    return f"{device}, {cause.phase or 'unknown phase'}: {needs}{size(cause.short_bytes)} short"


def _show(value: Any) -> str:
    """A cell as a reader wants it: four digits of a fraction, all of a whole number."""
    if value is None:
        return "–"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return _brief(text)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


_TEMPLATES.filters |= {"show": _show, "brief": lambda value: _brief(str(value))}
_TEMPLATES.filters |= {"counted": _count, "gpus": _gpus}


def _write_page(path: Path, **content) -> Path:
    # The nonce lets the page's own script run and no other, should escaping ever fail.
    page = _TEMPLATES.get_template("report.html").render(
        nonce=secrets.token_hex(16),
        style=(_HERE / "report.css").read_text(encoding="utf-8"),
        script=(_HERE / "report.js").read_text(encoding="utf-8"),
        **content,
    )
    write_whole(path, page.encode())
    return path
