"""A sweep's folder: what its files hold, how they are read, and how they are written so that no
crash leaves half of one.

It holds ``sweep.json`` (what was asked for: a list of ``RunSpec``) and a folder for each run, named
by its ``id``: ``spec.json``, ``outcome.json`` (there only when the run has ended; written last),
``records.jsonl`` (a ``Record`` a line), ``executed.ipynb`` and ``executed.html``, and ``running/``
while the run is being done.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

Scalar = bool | int | float | str
Value = Scalar | list[int] | list[float] | list[str]
Status = Literal["done", "oom", "failed", "timeout", "killed", "not run"]

OUTCOME = "outcome.json"
RECORDS = "records.jsonl"
# What a run leaves in its folder, beside its outcome.
RESULT_FILES = ("executed.ipynb", "executed.html", RECORDS, "executed.kernel.log")


class SweepError(RuntimeError):
    """A sweep cannot be begun or gone on with; no run is lost by it."""


class RunSpec(BaseModel):
    """One notebook with one set of parameters.

    Attributes:
        id: hash of everything below that decides the result.
        notebook: the notebook's file name.
        title: as the registry has it.
        parameters: every parameter of the notebook, defaults included.
        given: the names of those that the sweep sets.
        source: hash of the notebook's cells, without their outputs.
        package: hash of the packages' source; ``version`` is the number of this one.
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

    device: int | None = None
    phase: str | None = None
    short_bytes: int | None = None


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
        commit: of the packages' repository, "-dirty" after it where files had been changed; ""
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
    """A run's folder as it was read: ``outcome`` is None for one that has not ended, or whose files
    cannot be read, so that it is done again."""

    spec: RunSpec
    outcome: Outcome | None
    records: list[Record]

    @property
    def status(self) -> Status:
        """Of the outcome; "not run" without one."""
        return self.outcome.status if self.outcome else "not run"


def now() -> str:
    """Local time with zone, as the files have it."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def read_sweep(directory: Path | str) -> tuple[Sweep, list[FinishedRun]]:
    """A sweep's folder.

    Raises:
        FileNotFoundError: no sweep is there.
        ValueError: its ``sweep.json`` is not what it should be.
    """
    directory = Path(directory)
    path = directory / "sweep.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} holds no sweep.json. Expected the folder of a sweep, such as runs/fit;"
            " name that one."
        )
    try:
        sweep = Sweep.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path} is not valid: {error}. Give the sweep's command again.") from None
    return sweep, [_read_run(directory / spec.id, spec) for spec in sweep.runs]


def _read_run(folder: Path, spec: RunSpec) -> FinishedRun:
    try:
        outcome = Outcome.model_validate_json((folder / OUTCOME).read_bytes())
        records = read_records(folder / RECORDS)
    except (OSError, ValueError):  # no outcome yet, or files that something has damaged
        return FinishedRun(spec=spec, outcome=None, records=[])
    return FinishedRun(spec=spec, outcome=outcome, records=records)


def read_records(path: Path) -> list[Record]:
    """The scalars a run recorded; none if there is no file. A last line that was cut off is left
    out.

    Raises:
        ValueError: a line is no record.
    """
    if not path.is_file():
        return []
    # Lines end with this alone: a text may hold other characters at which Python breaks lines.
    *whole, _ = path.read_bytes().split(b"\n")
    return [Record.model_validate_json(line) for line in whole]


def prepare(directory: Path, name: str, specs: Sequence[RunSpec]):
    """Write down what a sweep is to do; runs that are there already keep their outcomes.

    Raises:
        SweepError: the folder cannot be written.
    """
    created = now()
    with contextlib.suppress(OSError, ValueError):
        created = Sweep.model_validate_json((directory / "sweep.json").read_bytes()).created
    sweep = Sweep(name=name, created=created, runs=list(specs))
    try:
        for spec in specs:
            (directory / spec.id).mkdir(parents=True, exist_ok=True)
            # Also where it is already: the time limit and the title may be others, which are not
            # part of the id.
            write_whole(directory / spec.id / "spec.json", spec.model_dump_json(indent=2) + "\n")
        write_whole(directory / "sweep.json", sweep.model_dump_json(indent=2) + "\n")
    except OSError as error:
        raise _not_writable(directory, error) from None


def keep(folder: Path, outcome: Outcome, files: Mapping[str, bytes] | None = None):
    """Write how a run ended into its folder, after everything else that it left.

    Raises:
        OSError: it cannot be written; then the run has no outcome.
    """
    (folder / OUTCOME).unlink(missing_ok=True)
    for name in RESULT_FILES:
        if name in (files or {}):
            write_whole(folder / name, files[name])
        else:
            (folder / name).unlink(missing_ok=True)  # of an earlier try
    write_whole(folder / OUTCOME, outcome.model_dump_json(indent=2) + "\n")


def write_whole(path: Path, content: str | bytes):
    """Replace a file so that a reader, or whoever comes after a crash, sees the old text or the
    new, never a part.

    Raises:
        OSError: it cannot be written, on a full disk for example; the old file is still there.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


@contextlib.contextmanager
def only_process(directory: Path, wait_seconds: float = 3.0) -> Iterator[None]:
    """Be the only one at a sweep: nothing in its folder changes before that is sure.

    Raises:
        SweepError: another process is at it still after ``wait_seconds``, or the folder cannot be
            written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Not the library filelock: it empties the file, and so changes it, before it has the lock.
        file = (directory / "lock").open("a")
    except OSError as error:
        raise _not_writable(directory, error) from None
    with file:
        # One that has just been killed may still be on its way out.
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise SweepError(
                        f"another process is running {directory}. Wait for it, or choose another"
                        " --output."
                    ) from None
                time.sleep(0.1)
        yield


def _not_writable(directory: Path, error: OSError) -> SweepError:
    return SweepError(
        f"{directory} cannot be written: {error}. Free space or choose another --output."
    )
