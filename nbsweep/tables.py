"""The runs of a sweep as columns: for the report's page, for a spreadsheet (CSV), and for pandas
and the like (Parquet)."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from .store import FinishedRun, OutOfMemoryCause, Record, Value


@dataclass
class Column:
    """A value for every row of a table; None where there is none.

    Attributes:
        group: "run", "clock", "parameter" or "scalar".
        unit: of the values; memory is in bytes.
        labels: where each value comes from, such as "simulated"; empty where none says so.
    """

    name: str
    group: str
    values: list[Value | None]
    unit: str = ""
    labels: list[str | None] = field(default_factory=list)


def runs_columns(runs: Sequence[FinishedRun]) -> list[Column]:
    """What is known of runs, a value a run. Of a name that one recorded several times this is the
    last value, which its label says."""
    ended = [run.outcome.model_dump() if run.outcome else {} for run in runs]
    causes = [each.get("oom") or {} for each in ended]
    records = list(map(series, runs))
    columns = [
        Column("id", "run", [run.spec.id for run in runs]),
        Column("notebook", "run", [run.spec.notebook for run in runs]),
        Column("status", "run", [status_of(run) for run in runs]),
        Column("seconds", "clock", [each.get("seconds") for each in ended]),
    ]
    for name in OutOfMemoryCause.model_fields:
        columns.append(Column(f"oom_{name}", "run", [cause.get(name) for cause in causes]))
    columns.append(Column("error", "run", [each.get("error") for each in ended]))
    for name in distinct(chain(*(run.spec.parameters for run in runs))):
        columns.append(Column(name, "parameter", [run.spec.parameters.get(name) for run in runs]))
    for key in distinct(chain(*records)):
        found = [each.get(key, []) for each in records]
        values = [some[-1].value if some else None for some in found]
        labels = [_label(some) if some else None for some in found]
        columns.append(Column(key[0], "scalar", values, key[1], labels))
    return columns


def series(run: FinishedRun) -> dict[tuple[str, str], list[Record]]:
    """What a run recorded, by name and unit, in its order."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in run.records:
        found.setdefault((record.name, record.unit), []).append(record)
    return found


def _label(some: list[Record]) -> str:
    return some[-1].label + (f" · last of {len(some)}" if len(some) > 1 else "")


def runs_table(runs: Sequence[FinishedRun]) -> dict[str, list[Value | None]]:
    """The runs as columns by name, a value a run: what runs.csv and runs.parquet hold. Memory is in
    bytes, time in seconds. A series has a column with all its values, too."""
    table = {}
    for column in runs_columns(runs):
        name = f"param.{column.name}" if column.group == "parameter" else column.name
        if column.group == "scalar":
            name = f"{column.name} [{column.unit}]"
        table[name] = column.values
        if column.labels:
            table[f"{name} label"] = column.labels
    all_series = list(map(series, runs))
    for key in distinct(chain(*all_series)):
        found = [[record.value for record in each.get(key, [])] for each in all_series]
        if any(len(values) > 1 for values in found):
            table[f"{key[0]} [{key[1]}] series"] = [values or None for values in found]
    return table


# U+2212 is the minus sign of typography.
_BEGIN_FORMULAS = ("=", "+", "-", "@", "\u2212")


def csv_bytes(table: dict[str, list]) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC)  # no separator breaks up a text
    writer.writerow(map(_harmless, table))
    writer.writerows(map(_harmless, row) for row in zip(*table.values(), strict=True))
    return file.getvalue().encode()


def _harmless(value: Value | None) -> Any:
    """A cell that no spreadsheet takes for a formula: text that begins like one gets an apostrophe
    before it. It may begin so behind what is not seen, and with signs of other widths."""
    if isinstance(value, list):
        value = json.dumps(value)
    if isinstance(value, float) and not math.isfinite(value):
        value = str(value)
    if not isinstance(value, str) or re.fullmatch(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?", value):
        return value
    plain = unicodedata.normalize("NFKC", value)
    seen = next((each for each in plain if unicodedata.category(each)[0] not in "CMZ"), None)
    hidden = any(unicodedata.category(each) == "Cc" for each in plain[:1])  # as a tab, or NUL
    return "'" + value if seen in _BEGIN_FORMULAS or hidden else value


def parquet_bytes(table: dict[str, list]) -> bytes | None:
    """The table with one type a column, text where values have several; None without pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return None
    columns = {}
    for name, values in table.items():
        values = [json.dumps(value) if isinstance(value, list) else value for value in values]
        try:
            columns[name] = pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError):
            texts = [each if isinstance(each, str | None) else json.dumps(each) for each in values]
            columns[name] = pyarrow.array(texts)
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def status_of(run: FinishedRun) -> str:
    return run.outcome.status if run.outcome else "unfinished"


def distinct(values: Iterable) -> list:
    """Each once, in the order they come."""
    return list(dict.fromkeys(values))
