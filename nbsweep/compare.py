"""What changed from one sweep to another: how runs ended, and what they recorded."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from .store import FinishedRun, Value, read_sweep
from .tables import distinct, series, status_of
from .words import is_number


class Change(BaseModel):
    """One difference between two sweeps, at one run.

    Attributes:
        kind: "status", "scalar", or the only sweep, first or second, that has the run.
        parameters: every parameter of the run, defaults included.
        name, unit: of the scalar; "" for the other kinds.
        before, after: status or scalar in the first and the second sweep; None where there is none.
        before_label, after_label: where the scalar comes from, "simulated" and so on.
        relative: (after - before) / |before| of two numbers; None where ``before`` is 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["status", "scalar", "only in first", "only in second"]
    notebook: str
    parameters: dict[str, Value]
    name: str = ""
    unit: str = ""
    before: Value | None = None
    after: Value | None = None
    before_label: str = ""
    after_label: str = ""
    relative: float | None = None


def compare(
    directory_a: Path | str, directory_b: Path | str, tolerance: float = 0.01
) -> list[Change]:
    """What changed from the first sweep to the second. Runs are matched by notebook and all
    parameters.

    ``tolerance``: a number that changed by no more than this is the same: relative to the first
    sweep's, absolute where that is 0. Runs of the same status are asked for scalars that only one
    of them has, too.

    Raises:
        FileNotFoundError, ValueError: as ``read_sweep``; or ``tolerance`` is below 0.
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(
            f"tolerance is {tolerance}; expected 0 or more, such as 0.01 for one percent."
        )
    first, second = (by_parameters(read_sweep(each)[1]) for each in (directory_a, directory_b))
    changes = []
    for key in distinct([*first, *second]):
        a, b = first.get(key), second.get(key)
        spec = (a or b).spec
        run = {"notebook": spec.notebook, "parameters": spec.parameters}
        kind = "status" if a and b else "only in first" if a else "only in second"
        before, after = a and status_of(a), b and status_of(b)
        if before != after:
            changes.append(Change(kind=kind, before=before, after=after, **run))
        old, new = (series(one) if one else {} for one in (a, b))
        # A run that ended early cannot have recorded everything.
        scalars = distinct([*old, *new]) if before == after else filter(new.__contains__, old)
        for name, unit in scalars:
            x, y = (found.get((name, unit), [None])[-1] for found in (old, new))
            values = {"before": x and x.value, "after": y and y.value}
            labels = {"before_label": x.label if x else "", "after_label": y.label if y else ""}
            changed, relative = _differ(*values.values(), tolerance)
            if changed:
                more = {"name": name, "unit": unit, "relative": relative, **values, **labels}
                changes.append(Change(kind="scalar", **more, **run))
    return changes


def by_parameters(runs: Sequence[FinishedRun]) -> dict[tuple, FinishedRun]:
    """Runs by notebook and parameters; the same asked for twice, as by another checkpoint, is told
    apart by order."""
    found: dict[tuple, FinishedRun] = {}
    seen: Counter = Counter()
    for run in runs:
        key = run.spec.notebook, json.dumps(run.spec.parameters, sort_keys=True)
        found[*key, seen[key]] = run
        seen[key] += 1
    return found


def _differ(
    before: Value | None, after: Value | None, tolerance: float
) -> tuple[bool, float | None]:
    """Whether two scalars differ, and the relative change where there is one."""
    if not (is_number(before) and is_number(after)):
        # In JSON, True is not 1, and NaN is NaN.
        return json.dumps(before) != json.dumps(after), None
    if before == 0:
        return abs(after) > tolerance, None
    relative = (after - before) / abs(before)
    return abs(relative) > tolerance, relative
