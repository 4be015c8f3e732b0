"""The report of a sweep: ``report.html`` (one self-contained page), ``runs.csv`` and
``runs.parquet`` in its folder, and what changed between two sweeps.

Every file is written whole: a reader never sees half of one. Where a run recorded a name twice, the
last one counts.
"""

from __future__ import annotations

import json
import math
import secrets
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import jinja2

from .compare import by_parameters, compare
from .provenance import DISTRIBUTION
from .store import FinishedRun, OutOfMemoryCause, Record, Status, Value, read_sweep, write_whole
from .tables import csv_bytes, distinct, parquet_bytes, runs_table, status_of
from .words import is_number, unit_for

STATUSES = (*get_args(Status), "unfinished")
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
        print(NO_PARQUET)
    else:
        write_whole(directory / "runs.parquet", parquet)
    counts = Counter(status_of(run) for run in runs)
    return _write_page(
        directory / "report.html",
        kind="sweep",
        title=sweep.name,
        headline=f"{counts['done']:,} of {len(runs):,} runs done",
        sweep=sweep,
        runs=runs,
        counts={status: counts[status] for status in STATUSES},
        seconds=sum(run.outcome.seconds for run in runs if run.outcome),
        platforms=Counter(
            run.outcome.platform for run in runs if run.outcome and run.outcome.platform
        ),
        versions=_versions(runs),
        no_parquet=NO_PARQUET if parquet is None else None,
        **_report_table(runs, directory),
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
        cells = [change.kind, change.notebook, *(change.parameters.get(name) for name in given)]
        unit, size = unit_for(change.unit, [change.before, change.after])
        cells += [change.name or None, unit or None]
        cells += [_scaled(change.before, size), _scaled(change.after, size)]
        cells.append(None if change.relative is None else 100 * change.relative)
        labels = {len(cells) - 3: change.before_label, len(cells) - 2: change.after_label}
        rows.append(
            {"cells": cells, "labels": {index: label for index, label in labels.items() if label}}
        )
    columns = [(name, "run", "%" if name == "change" else "") for name in names]
    changed = len({(change.notebook, json.dumps(change.parameters)) for change in changes})
    return _write_page(
        Path(path),
        kind="comparison",
        title=f"{sweep_a.name} and {sweep_b.name}",
        headline=f"{_count(len(changes), 'difference')} at {_count(changed, 'run')}",
        sweeps=[(sweep_a, len(runs_a)), (sweep_b, len(runs_b))],
        matched=len(matched),
        tolerance=tolerance,
        **_table(columns, rows),
    )


_Columns = list[tuple[str, str, str]]  # name, group, unit


def _report_table(runs: Sequence[FinishedRun], directory: Path) -> dict[str, Any]:
    """The page's table and pictures: columns, rows, failures, and whether there is an OOM frontier
    to draw."""
    given = distinct(name for run in runs for name in run.spec.given)
    recorded = [{(record.name, record.unit): record for record in run.records} for run in runs]
    units = {
        key: unit_for(key[1], [records[key].value for records in recorded if key in records])
        for key in distinct(chain(*recorded))
    }
    failures = _failures(runs, given)
    failure_of = {index: failure["tag"] for failure in failures for index in failure["runs"]}
    rows = []
    for index, (run, records) in enumerate(zip(runs, recorded, strict=True)):
        row = _row(run, failure_of.get(index), given, records, units)
        row["executed"] = (directory / run.spec.id / "executed.html").is_file()
        rows.append(row)
    table = _table(_columns(given, units), rows)
    return {**table, "failures": failures, "frontier": _has_frontier(runs, given)}


def _columns(given: Sequence[str], units: dict[tuple[str, str], tuple[str, int]]) -> _Columns:
    columns = [(name, "run", "") for name in ("run", "notebook", "status", "failure")]
    columns += [("seconds", "clock", ""), *((name, "parameter", "") for name in given)]
    columns += [(name, "scalar", unit) for (name, _), (unit, _) in units.items()]
    return [*columns, ("error", "run", "")]


def _row(
    run: FinishedRun,
    failure: str | None,
    given: Sequence[str],
    records: dict[tuple[str, str], Record],
    units: dict[tuple[str, str], tuple[str, int]],
) -> dict[str, Any]:
    """A run's cells, in the order of ``_columns``, and the labels of those that have one."""
    outcome, cause = run.outcome, run.outcome and run.outcome.oom
    cells = [run.spec.id, run.spec.notebook, status_of(run), failure]
    labels = {len(cells): "measured, wall clock"} if outcome else {}
    cells += [outcome and outcome.seconds, *(run.spec.parameters.get(name) for name in given)]
    for key, (_, size) in units.items():
        if key in records:
            labels[len(cells)] = records[key].label
        cells.append(_scaled(records[key].value, size) if key in records else None)
    cells.append(outcome and outcome.error)
    short_gib = cause and cause.short_bytes and cause.short_bytes / 2**30
    oom = cause and _short(cause)
    return {"cells": cells, "labels": labels, "oom": oom, "short_gib": short_gib}


def _has_frontier(runs: Sequence[FinishedRun], given: Sequence[str]) -> bool:
    """Whether some runs fit and some do not, along a number and another parameter."""
    values = {name: [run.spec.parameters.get(name) for run in runs] for name in given}
    numbers = [name for name in given if len(set(filter(is_number, values[name]))) > 1]
    varied = [
        name
        for name in given
        if len({json.dumps(value) for value in values[name] if value is not None}) > 1
    ]
    both = {"done", "oom"} <= {status_of(run) for run in runs}
    return both and bool(numbers) and len(varied) > 1


def _table(columns: _Columns, rows: list[dict]) -> dict[str, list]:
    """Columns (name, group, unit) as the page wants them, and the cells of rows as JSON takes them.

    A column is hidden where it says nothing, and has a label where all its cells have the same.
    """
    found = []
    for index, (name, group, unit) in enumerate(columns):
        for row in rows:
            value = row["cells"][index]
            if isinstance(value, list) or (isinstance(value, float) and not math.isfinite(value)):
                row["cells"][index] = json.dumps(value)
        values = [row["cells"][index] for row in rows if row["cells"][index] is not None]
        labels = {row["labels"][index] for row in rows if index in row["labels"]}
        column = {"index": index, "name": name, "group": group, "unit": unit}
        column["numeric"] = bool(values) and all(map(is_number, values))
        column["label"] = labels.pop() if len(labels) == 1 else None
        column["hidden"] = not values or (
            name == "notebook" and group == "run" and len(set(values)) == 1
        )
        found.append(column)
    return {"columns": found, "rows": rows}


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
        shared = {}
        for name in filter(runs[members[0]].spec.parameters.__contains__, given):
            values = [json.dumps(run.spec.parameters.get(name)) for run in runs]
            if len({values[index] for index in members}) == 1 < len(set(values)):
                shared[name] = runs[members[0]].spec.parameters[name]
        failures.append(
            {
                "tag": f"F{len(failures) + 1}",
                "signature": cause,
                "runs": members,
                "statuses": distinct(status_of(runs[index]) for index in members),
                "example": runs[members[0]].outcome,
                "shared": shared,
            }
        )
    return failures


def _versions(runs: Sequence[FinishedRun]) -> dict[str, Counter]:
    """Package → version → in how many runs, the notebooks' own first, by number and hash; then
    commit and GPUs."""
    found = {DISTRIBUTION: Counter(f"{run.spec.version} ({run.spec.package[:12]})" for run in runs)}
    for run in runs:
        for name, version in (run.outcome.versions if run.outcome else {}).items():
            if name.replace("_", "-") != DISTRIBUTION:
                found.setdefault(name, Counter())[version] += 1
    outcomes = [run.outcome for run in runs if run.outcome]
    found["commit"] = Counter(outcome.commit or "unknown" for outcome in outcomes)
    found["GPUs"] = Counter(_gpus(outcome.cards) for outcome in outcomes)
    return found


def _gpus(names: list[str] | None) -> str:
    return "unknown" if names is None else "; ".join(names) or "none"


def _scaled(value: Value | None, size: int) -> Value | None:
    return value / size if size > 1 and is_number(value) else value


def _short(cause: OutOfMemoryCause) -> str:
    """Where a run ran out of memory, as words."""
    unit, size = unit_for("bytes", [cause.short_bytes])
    missing = (
        "unknown bytes"
        if cause.short_bytes is None
        else f"{_show(_scaled(cause.short_bytes, size))} {unit}"
    )
    device = "unknown device" if cause.device is None else f"GPU {cause.device}"
    return f"{device}, {cause.phase or 'unknown phase'}: {missing} short"


def _show(value: Any) -> str:
    """A cell as a reader wants it: four digits of a fraction, all of a whole number."""
    if value is None:
        return "–"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


_TEMPLATES.filters |= {"show": _show, "counted": _count, "gpus": _gpus}


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
