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
import functools
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from filelock import FileLock, Timeout
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from .words import shortened

Scalar = bool | int | float | str
Value = Scalar | list[int] | list[float] | list[str]
Status = Literal["done", "oom", "failed", "timeout", "killed", "not run"]

OUTCOME = "outcome.json"
RECORDS = "records.jsonl"
# What a run leaves in its folder, beside its outcome.
RESULT_FILES = ("executed.ipynb", "executed.html", RECORDS, "executed.kernel.log")


def _at_most(characters: int) -> AfterValidator:
    """A message of megabytes would be in the report several times."""
    return AfterValidator(functools.partial(shortened, most=characters, where="executed.ipynb"))


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
    timeout_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class OutOfMemoryCause(BaseModel):
    """Where a run ran out of memory; None for what its message did not say.

    Attributes:
        device: index of the card.
        phase: name of the stage.
        short_bytes: how much more memory the request needed.
        needs_bytes: what the program held of the card, and the request: it needs at least so much.
    """

    model_config = ConfigDict(extra="forbid")

    device: int | None = None
    phase: str | None = None
    short_bytes: int | None = None
    needs_bytes: int | None = None


class Outcome(BaseModel):
    """How a run ended.

    Attributes:
        status: "done"; "oom", an out-of-memory error nobody caught; "failed", any other error;
            "timeout"; "killed", the kernel or the worker died; "not run", with the reason in
            ``error``.
        started: local time with zone, ISO 8601.
        cells, failed_cell: code cells of the notebook, and the one that failed, counted from 1.
        error: one line; a very long one without its middle, as the traceback.
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
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    cells: int = 0
    failed_cell: int | None = None
    error: Annotated[str, _at_most(2_000)] | None = None
    signature: Annotated[str, _at_most(2_000)] | None = None
    traceback: Annotated[str, _at_most(20_000)] | None = None
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
    cannot be read, which ``problem`` says then, so that it is done again."""

    spec: RunSpec
    outcome: Outcome | None
    records: list[Record]
    problem: str | None = None

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
    problem = None
    try:
        content = (folder / OUTCOME).read_bytes()
        outcome = Outcome.model_validate_json(content)
        return FinishedRun(spec=spec, outcome=outcome, records=read_records(folder / RECORDS))
    except FileNotFoundError:  # no outcome yet
        pass
    except ValidationError as error:
        problem = f"run {spec.id}: {OUTCOME} cannot be read ({error.errors()[0]['msg']})"
    except (OSError, ValueError) as error:
        problem = f"run {spec.id}: {error}"
    return FinishedRun(spec=spec, outcome=None, records=[], problem=problem)


def read_records(path: Path) -> list[Record]:
    """The scalars a run recorded; none if there is no file.

    Raises:
        ValueError: a line is no record.
    """
    return parse_records(path.read_bytes()) if path.is_file() else []


def parse_records(content: bytes) -> list[Record]:
    """The scalars of a file of records. Raises ValueError, as ``read_records``."""
    records = []
    # Lines end with this alone: a text may hold other characters at which Python breaks lines.
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            records += [Record.model_validate_json(line)] if content else []
        except ValidationError:
            raise ValueError(
                f"line {number} of {RECORDS} is no record, but {reprlib.repr(line)}; let `record`"
                " alone write there"
            ) from None
    return records


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
        SweepError: another process is at it still after ``wait_seconds``, as one that has been
            killed may be for a moment; or the folder cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / "lock", timeout=wait_seconds).acquire()
    except Timeout:
        raise SweepError(
            f"another process is running {directory}. Wait for it, or choose another --output."
        ) from None
    except OSError as error:
        raise _not_writable(directory, error) from None
    with lock:
        yield


def _not_writable(directory: Path, error: OSError) -> SweepError:
    return SweepError(
        f"{directory} cannot be written: {error}. Free space or choose another --output."
    )
