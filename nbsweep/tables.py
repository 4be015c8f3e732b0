"""The runs of a sweep as columns, for a spreadsheet (CSV) and for pandas and the like (Parquet)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from .store import FinishedRun, OutOfMemoryCause, Value


def runs_table(runs: Sequence[FinishedRun]) -> dict[str, list[Value | None]]:
    """The runs as columns, a value a run: what runs.csv and runs.parquet hold. Memory is in bytes,
    time in seconds."""
    parts = []
    for run in runs:
        ended = run.outcome and run.outcome.model_dump()
        cause = ended and ended["oom"]
        row = {"id": run.spec.id, "notebook": run.spec.notebook, "status": status_of(run)}
        row["seconds"] = ended and ended["seconds"]
        row |= {f"oom_{name}": cause and cause[name] for name in OutOfMemoryCause.model_fields}
        row["error"] = ended and ended["error"]
        records = {}
        for record in run.records:
            records[f"{record.name} [{record.unit}]"] = record.value
            records[f"{record.name} [{record.unit}] label"] = record.label
        parts.append(
            (row, {f"param.{name}": value for name, value in run.spec.parameters.items()}, records)
        )
    names = distinct(name for part in range(3) for row in parts for name in row[part])
    merged = [row | parameters | records for row, parameters, records in parts]
    return {name: [row.get(name) for row in merged] for name in names}


def csv_bytes(table: dict[str, list]) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow([_harmless(name) for name in table])
    writer.writerows(
        [_harmless(value) for value in row] for row in zip(*table.values(), strict=True)
    )
    return file.getvalue().encode()


def _harmless(value: Value | None) -> Any:
    """A cell that no spreadsheet takes for a formula: text that begins like one gets an apostrophe
    before it."""
    if isinstance(value, list):
        return json.dumps(value)
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        try:
            float(value)
        except ValueError:
            return "'" + value
    return value


def parquet_bytes(table: dict[str, list]) -> bytes | None:
    """The table with one type a column, or None without pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return None
    file = io.BytesIO()
    columns = {name: _one_type(values) for name, values in table.items()}
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def _one_type(values: list[Value | None]) -> list:
    """Booleans, 64-bit integers or floats where all are; text otherwise, JSON for what is no
    text."""
    kinds = {type(value) for value in values if value is not None}
    fits = all(abs(value) < 2**63 for value in values if isinstance(value, int))
    if kinds <= {bool} or (kinds <= {int} and fits):
        return values
    if kinds <= {int, float} and fits:
        return [None if value is None else float(value) for value in values]
    return [value if isinstance(value, str | None) else json.dumps(value) for value in values]


def status_of(run: FinishedRun) -> str:
    return run.outcome.status if run.outcome else "unfinished"


def distinct(values: Iterable) -> list:
    """Each once, in the order they come."""
    return list(dict.fromkeys(values))
