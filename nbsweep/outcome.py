"""What an experiment's run is, how it ended, and what it recorded: the files of a run's folder.

A sweep's folder holds ``sweep.json`` (what was asked for: a list of ``RunSpec``) and a folder for
each run, named by its ``id``: ``spec.json``, ``outcome.json`` (there only when the run has ended),
``records.jsonl`` (a ``Record`` a line), ``executed.ipynb`` and ``executed.html``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

Scalar = bool | int | float | str
Value = Scalar | list[int] | list[float] | list[str]
Status = Literal["done", "oom", "failed", "timeout", "killed", "not run"]


class RunSpec(BaseModel):
    """One notebook with one set of parameters.

    Attributes:
        id: hash of everything below that decides the result.
        notebook: file name inside the notebooks' folder.
        title: as the registry has it.
        parameters: every parameter of the notebook, defaults included.
        given: the names of those that the sweep sets.
        source: hash of the notebook's cells, without their outputs.
        package: hash of the package's source; ``version`` is its number.
        checkpoint: fingerprint of the checkpoint that a parameter of that name points to, or "".
        timeout_seconds: the run is ended after so long.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    notebook: str
    title: str
    parameters: dict[str, Value]
    given: list[str]
    source: str
    package: str
    version: str
    checkpoint: str
    timeout_seconds: float


class OutOfMemoryCause(BaseModel):
    """Where a run ran out of memory; None for what its message did not say."""

    model_config = ConfigDict(extra="forbid")

    device: int | None
    phase: str | None
    short_bytes: int | None


class Outcome(BaseModel):
    """How a run ended.

    Attributes:
        status: "done"; "oom", an out-of-memory error nobody caught; "failed", any other error;
            "timeout"; "killed", the kernel or the worker died; "not run", with the reason in
            ``error``.
        started: local time with zone, ISO 8601.
        cells, failed_cell: code cells of the notebook, and the one that failed, counted from 1.
        error: one line.
        signature: the same for errors of the same cause: type and message without numbers and
            addresses.
        traceback: of the error, without private paths.
        versions, platform: what it ran on.
        cards: the machine's GPUs by name, with their driver; None where nobody could look. The
            figures say for themselves which were simulated.
        commit: of the package's repository, "-dirty" after it where files had been changed; ""
            outside one.
    """

    model_config = ConfigDict(extra="forbid")

    status: Status
    started: str
    seconds: float
    cells: int = 0
    failed_cell: int | None = None
    error: str | None = None
    signature: str | None = None
    traceback: str | None = None
    oom: OutOfMemoryCause | None = None
    versions: dict[str, str] = {}
    platform: str = ""
    cards: list[str] | None = None
    commit: str = ""


class Record(BaseModel):
    """A scalar a notebook has recorded. ``label``: "simulated", "measured on ...", "cited ..." or
    "arithmetic"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    value: Scalar
    unit: str
    label: str


class Sweep(BaseModel):
    """What a sweep's folder is about: its name, when it was first asked for, and its runs in
    order."""

    model_config = ConfigDict(extra="forbid")

    name: str
    created: str
    runs: list[RunSpec]


class FinishedRun(BaseModel):
    """A run's folder as it was read: ``outcome`` is None for one that has not ended."""

    spec: RunSpec
    outcome: Outcome | None
    records: list[Record]

    @property
    def status(self) -> Status:
        """Of the outcome; "not run" without one."""
        return self.outcome.status if self.outcome else "not run"


def read_sweep(directory: Path | str) -> tuple[Sweep, list[FinishedRun]]:
    """A sweep's folder.

    Raises:
        FileNotFoundError: no sweep is there.
        ValueError: a file of it is not what it should be; the message names it.
    """
    directory = Path(directory)
    path = directory / "sweep.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} holds no sweep.json. Expected the folder of a sweep, such as runs/fit;"
            " name that one."
        )
    sweep = _read(Sweep, path)
    runs = []
    for spec in sweep.runs:
        folder = directory / spec.id
        outcome = folder / "outcome.json"
        runs.append(
            FinishedRun(
                spec=spec,
                outcome=_read(Outcome, outcome) if outcome.is_file() else None,
                records=read_records(folder / "records.jsonl"),
            )
        )
    return sweep, runs


def read_records(path: Path) -> list[Record]:
    """The scalars a run recorded; none if there is no file. A last line that was cut off is left
    out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    try:
        return [Record.model_validate_json(line) for line in whole]
    except ValueError as error:
        raise ValueError(
            f"{path} is not a file of records: {error}. Remove it and run again."
        ) from None


def _read(kind, path: Path):
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid: {error}. Remove it and run again.") from None
