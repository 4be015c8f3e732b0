"""Sweeps on worker processes: how runs end, what is repeated, and that nothing is lost whoever is
killed when."""

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from run_cells import ENDINGS, KEEP

from nbsweep import pool, worker
from nbsweep.outcome import Outcome, read_sweep
from nbsweep.pool import SweepError, prepare, run_sweep
from nbsweep.specs import run_spec

# Nothing here imports torch, so that a run takes a second or two. Figures are recorded as `record`
# does.
PARAMETERS = 'number = 1\nmode = "done"\nseconds = 0.0'
RECORD = f"""
import json, os, signal, subprocess, sys, time
{KEEP}
with open("executions.txt", "a") as log:
    log.write(f"{{number}} begins {{os.getpid()}}\\n")
keep("begin", number)
"""
BODY = ENDINGS + "time.sleep(seconds)"
END = """
keep("square", number * number)
with open("executions.txt", "a") as log:
    log.write(f"{number} ends {os.getpid()}\\n")
"""


@pytest.fixture
def notebooks(tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    cells = [nbformat.v4.new_code_cell(source) for source in (PARAMETERS, RECORD, BODY, END)]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "01_small.ipynb")
    return folder


def specs(notebooks, *settings, timeout_seconds=60):
    defaults = {"number": 1, "mode": "done", "seconds": 0.0}
    path = notebooks / "01_small.ipynb"
    return [run_spec(path, "Small", defaults, given, timeout_seconds) for given in settings]


def executions(notebooks, word="ends") -> list[int]:
    path = notebooks / "executions.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [int(line.split()[0]) for line in lines if f" {word} " in line]


def test_every_way_to_end_is_a_class_with_its_cause(notebooks, tmp_path):
    modes = ("done", "oom", "failed", "killed", "hung")
    settings = [{"mode": mode, "number": 3} for mode in modes]
    directory = tmp_path / "runs" / "ends"
    prepare(directory, "ends", specs(notebooks, *settings, timeout_seconds=4))
    begin = time.monotonic()
    runs = run_sweep(directory, notebooks, workers=2)
    outcomes = {run.spec.parameters["mode"]: run.outcome for run in runs}
    assert [outcomes[mode].status for mode in modes] == [
        "done",
        "oom",
        "failed",
        "killed",
        "timeout",
    ]
    cause = outcomes["oom"].oom
    assert (cause.device, cause.short_bytes) == (1, 2**30)
    assert outcomes["failed"].signature == "ValueError: number # at <object object at #x…> of …"
    assert outcomes["failed"].failed_cell == 3
    assert "raise ValueError" in outcomes["failed"].traceback
    assert outcomes["killed"].seconds < 10, "a dead kernel is noticed"
    assert "4 seconds" in outcomes["hung"].error
    assert time.monotonic() - begin < 45
    assert [(record.name, record.value) for record in runs[0].records] == [
        ("begin", 3),
        ("square", 9),
    ]
    # What the hung notebook had started, in a session of its own, is gone too.
    assert not [
        each
        for each in psutil.process_iter(["cmdline"])
        if "time.sleep(300)" in str(each.info["cmdline"])
    ]


def test_what_has_ended_is_not_repeated_unless_asked_for_and_what_was_killed_is(
    notebooks, tmp_path
):
    directory = tmp_path / "runs" / "again"
    wanted = specs(
        notebooks, {"number": 1}, {"number": 2, "mode": "failed"}, {"number": 3, "mode": "killed"}
    )
    prepare(directory, "again", wanted)
    run_sweep(directory, notebooks)
    assert executions(notebooks, "begins") == [1, 2, 3]
    run_sweep(directory, notebooks)
    assert executions(notebooks, "begins")[3:] == [3]
    run_sweep(directory, notebooks, retry=True)
    assert executions(notebooks, "begins")[4:] == [2, 3]
    run_sweep(directory, notebooks, force=True)
    assert executions(notebooks, "begins")[6:] == [1, 2, 3]
    assert [len(run.records) for run in read_sweep(directory)[1]] == [2, 1, 1], (
        "of the last time only"
    )


def test_the_longest_notebook_begins_first_and_runs_of_one_keep_their_order(notebooks, tmp_path):
    (notebooks / "02_long.ipynb").write_bytes((notebooks / "01_small.ipynb").read_bytes())
    defaults = {"number": 1, "mode": "done", "seconds": 0.0}
    long = run_spec(notebooks / "02_long.ipynb", "Long", defaults, {"number": 3}, 60)
    prepare(tmp_path / "runs", "order", [*specs(notebooks, {"number": 1}, {"number": 2}), long])
    minutes = {"01_small.ipynb": 1.0, "02_long.ipynb": 2.0}
    runs = run_sweep(tmp_path / "runs", notebooks, minutes=minutes)
    assert executions(notebooks) == [3, 1, 2]
    assert [run.spec.parameters["number"] for run in runs] == [1, 2, 3]


def test_a_changed_notebook_parameter_or_checkpoint_is_another_run_and_its_outputs_are_none(
    notebooks, tmp_path
):
    first = specs(notebooks, {"number": 1})[0]
    assert specs(notebooks, {"number": 1})[0] == first
    assert specs(notebooks, {"number": 2})[0].id != first.id
    path = notebooks / "01_small.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="seen")]
    notebook.cells[1].execution_count = 7
    nbformat.write(notebook, path)
    assert specs(notebooks, {"number": 1})[0].id == first.id
    notebook.cells[1].source += "\n"
    nbformat.write(notebook, path)
    assert specs(notebooks, {"number": 1})[0].id != first.id
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    ids = set()
    for text in ("{}", "{} "):
        (checkpoint / "config.json").write_text(text)
        ids.add(run_spec(path, "", {"checkpoint": str(checkpoint)}, {}, 1).id)
    assert len(ids) == 2


def test_two_processes_cannot_run_one_sweep(notebooks, tmp_path):
    directory = tmp_path / "runs" / "busy"
    prepare(directory, "busy", specs(notebooks, {"number": 1}))
    with (
        pool.locked(directory / "lock"),
        pytest.raises(SweepError, match="another process is running"),
    ):
        run_sweep(directory, notebooks)


def test_an_outcome_that_cannot_be_written_stops_the_sweep_and_the_next_one_does_the_run(
    notebooks, tmp_path, monkeypatch
):
    directory = tmp_path / "runs" / "full"
    (spec,) = specs(notebooks, {"number": 4})
    prepare(directory, "full", [spec])

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(worker, "write_whole", full)
    assert worker.perform(directory, spec.id, notebooks).startswith(
        "not-written [Errno 28] No space left"
    )
    assert not (directory / spec.id / "outcome.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr(pool, "ENDED", "never")  # as if the worker had said that
    with pytest.raises(SweepError, match="could not be written.*run the same command again"):
        run_sweep(directory, notebooks)
    monkeypatch.undo()
    (run,) = run_sweep(directory, notebooks)
    assert run.outcome.status == "done"
    assert [record.value for record in run.records] == [4, 16]


def test_a_sweep_on_a_full_disk_cannot_be_prepared_and_says_so(notebooks, tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pool, "write_whole", full)
    with pytest.raises(
        SweepError, match="No space left on device. Free space or choose another --output"
    ):
        prepare(tmp_path / "runs", "full", specs(notebooks, {"number": 1}))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    pool.write_whole(path, "old")
    monkeypatch.setattr(
        os, "fsync", lambda number: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))
    )
    with pytest.raises(OSError, match="full"):
        pool.write_whole(path, "new")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


# A shell that starts tests in the background has them ignore interrupts, and what they start too.
RUNNER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from nbsweep.pool import run_sweep
run_sweep(Path(sys.argv[1]), Path(sys.argv[2]), workers=2)
"""


def start(directory, notebooks):
    command = [sys.executable, "-c", RUNNER, str(directory), str(notebooks)]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def family(runner) -> dict[str, list[psutil.Process]]:
    """The processes of a runner by what they are."""
    found = {"runner": [psutil.Process(runner.pid)], "worker": [], "kernel": []}
    for child in found["runner"][0].children(recursive=True):
        try:
            command = " ".join(child.cmdline())
        except psutil.Error:
            continue
        for kind, mark in (("worker", "experiment.worker"), ("kernel", "ipykernel")):
            if mark in command:
                found[kind].append(child)
    return found


def leftovers(notebooks) -> list[psutil.Process]:
    """Workers and kernels that still work on these notebooks."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(notebooks) in " ".join(process.cmdline()) or (
                "ipykernel" in " ".join(process.cmdline()) and process.cwd() == str(notebooks)
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_killing_whatever_whenever_loses_doubles_and_invents_nothing(notebooks, tmp_path):
    directory = tmp_path / "runs" / "killed"
    wanted = specs(notebooks, *({"number": number, "seconds": 0.5} for number in range(14)))
    prepare(directory, "killed", wanted)
    chance, kills = random.Random(int(os.environ.get("KILL_SEED", "0"))), 0
    deadline = time.monotonic() + 240
    runner = start(directory, notebooks)
    while kills < 20 and time.monotonic() < deadline:
        time.sleep(chance.uniform(0.1, 2.5))
        if runner.poll() is not None:
            runner = start(directory, notebooks)
            if all(
                run.outcome and run.outcome.status == "done" for run in read_sweep(directory)[1]
            ):
                break
            continue
        try:
            choices = [each for kind in family(runner).values() for each in kind[:1]]
            chance.choice(choices).send_signal(signal.SIGKILL)
            kills += 1
        except psutil.Error:
            continue
        for run in read_sweep(directory)[1]:  # at any moment every file that is there is whole
            if run.outcome and run.outcome.status == "done":
                assert [record.name for record in run.records] == ["begin", "square"]
    assert kills >= 10
    runner.wait(timeout=120)
    for _ in range(5):  # what was killed is done by one of the next
        runs = run_sweep(directory, notebooks, workers=2)
        if all(run.outcome.status == "done" for run in runs):
            break
    assert [run.spec.id for run in runs] == [spec.id for spec in wanted]
    for run in runs:
        assert run.outcome.status == "done"
        number = run.spec.parameters["number"]
        assert [(record.name, record.value) for record in run.records] == [
            ("begin", number),
            ("square", number**2),
        ]
    assert set(executions(notebooks)) == set(range(14))
    time.sleep(2)
    assert leftovers(notebooks) == []


def test_an_interrupt_ends_workers_and_kernels_and_the_next_sweep_goes_on(notebooks, tmp_path):
    directory = tmp_path / "runs" / "interrupted"
    wanted = specs(
        notebooks, {"number": 1}, *({"number": number, "seconds": 30.0} for number in (2, 3))
    )
    prepare(directory, "interrupted", wanted)
    runner = start(directory, notebooks)
    deadline = time.monotonic() + 60
    while len(executions(notebooks, "begins")) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(runner.pid, signal.SIGINT)
    runner.wait(timeout=120)
    assert "KeyboardInterrupt" in runner.stderr.read().decode()
    assert leftovers(notebooks) == []
    statuses = [run.outcome and run.outcome.status for run in read_sweep(directory)[1]]
    assert statuses == ["done", None, None]


def test_a_worker_that_dies_is_replaced_and_its_run_is_marked_killed(notebooks, tmp_path):
    directory = tmp_path / "runs" / "dies"
    wanted = specs(notebooks, {"number": 1, "seconds": 20.0}, {"number": 2})
    prepare(directory, "dies", wanted)
    runner = start(directory, notebooks)
    deadline = time.monotonic() + 60
    while executions(notebooks, "begins").count(1) < 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    number_one = None
    # A busy machine shows the kernel a little later.
    while number_one is None and time.monotonic() < deadline:
        with contextlib.suppress(psutil.Error, OSError, ValueError):
            kernel = int((directory / wanted[0].id / "kernel.pid").read_text())
            workers = family(runner)["worker"]
            number_one = next(
                (each for each in workers if kernel in {c.pid for c in each.children()}), None
            )
    assert number_one is not None
    number_one.kill()
    assert runner.wait(timeout=60) == 0
    outcomes = [run.outcome for run in read_sweep(directory)[1]]
    assert [outcome.status for outcome in outcomes] == ["killed", "done"]
    assert outcomes[0].error == "the worker died (signal 9)"
    assert leftovers(notebooks) == []


def test_files_of_a_sweep_that_are_not_valid_are_named(notebooks, tmp_path):
    directory = tmp_path / "runs" / "bad"
    with pytest.raises(FileNotFoundError, match="holds no sweep.json"):
        read_sweep(directory)
    (spec,) = specs(notebooks, {"number": 1})
    prepare(directory, "bad", [spec])
    (directory / spec.id / "outcome.json").write_text('{"status": "great"}')
    with pytest.raises(ValueError, match="outcome.json is not valid"):
        read_sweep(directory)


def test_a_line_of_records_that_was_cut_off_is_left_out(tmp_path):
    from nbsweep.outcome import read_records

    path = tmp_path / "records.jsonl"
    line = json.dumps({"name": "a", "value": 1, "unit": "", "label": "arithmetic"})
    path.write_text(f"{line}\n{line[:10]}")
    assert len(read_records(path)) == 1


def test_an_outcome_reads_back_as_it_was_written(tmp_path):
    outcome = Outcome(status="done", started="now", seconds=1.5)
    pool.write_whole(Path(tmp_path / "outcome.json"), outcome.model_dump_json())
    assert Outcome.model_validate_json((tmp_path / "outcome.json").read_text()) == outcome
