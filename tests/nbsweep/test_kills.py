"""Whoever is killed whenever, nothing is lost, doubled or invented, and nothing goes on running."""

import functools
import os
import random
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
from run_cells import KEEP
from waiting import until

from nbsweep.store import read_sweep

RUNS = 12
PARAMETERS = "number = 1\nseconds = 0.3\nchild = False"
BODY = f"""
import json, os, subprocess, sys, time
{KEEP}
with open("executions.txt", "a") as log:
    log.write(f"{{number}} begins {{os.getpid()}}\\n")
keep("begin", number)
if child:
    sleep = [sys.executable, "-c", "import time; time.sleep(600)", os.getcwd()]
    subprocess.Popen(sleep, start_new_session=True)
time.sleep(seconds)
keep("square", number * number)
with open("executions.txt", "a") as log:
    log.write(f"{{number}} ends {{os.getpid()}}\\n")
"""
REGISTRY = """
[[notebook]]
file = "01_small.ipynb"
title = "Small"
tier = "core"
hardware = "any"
timeout_seconds = 60
minutes = 1
"""
# A shell that starts tests in the background has them ignore interrupts, and what they start too.
COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from nbsweep.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def place(tmp_path):
    """A folder with a notebook and its registry."""
    (tmp_path / "notebooks").mkdir()
    cells = [nbformat.v4.new_code_cell(source) for source in (PARAMETERS, BODY)]
    cells[0].metadata["tags"] = ["parameters"]
    path = tmp_path / "notebooks" / "01_small.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    (tmp_path / "notebooks" / "registry.toml").write_text(REGISTRY)
    return tmp_path


@pytest.fixture
def start(place):
    """Starts a sweep of these numbers with these settings, as a user does; returns its process."""
    started = []

    def start(numbers, **settings):
        file = place / "small.toml"
        given = "".join(f"set.{name} = {value}\n" for name, value in settings.items())
        file.write_text(f'[[runs]]\nnotebook = "01"\ngrid.number = {list(numbers)}\n{given}')
        arguments = ["sweep", str(file), "--output", str(place / "runs"), "--workers", "2"]
        command = [sys.executable, "-c", COMMAND, *arguments]
        log = (place / "log.txt").open("ab")
        # Also where the tests themselves were started to outlive their terminal.
        as_usual = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
        streams = {"stdout": log, "stderr": log}
        options = {"cwd": place, "start_new_session": True, "preexec_fn": as_usual}
        started.append(subprocess.Popen(command, **streams, **options))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def executions(place, word) -> list[int]:
    path = place / "notebooks" / "executions.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [int(line.split()[0]) for line in lines if f" {word} " in line]


def kernels(process) -> list[psutil.Process]:
    """The kernels of a sweep, those that are starting included."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:
        return []


def leftovers(place) -> list[psutil.Process]:
    """Processes that still work in this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd().startswith(str(place)) and process.pid != os.getpid():
                found.append(process)
        except psutil.Error:
            continue
    return found


def statuses(place) -> list[str]:
    return [run.status for run in read_sweep(place / "runs" / "small")[1]]


def test_forty_kills_at_any_moment_lose_double_and_invent_nothing(place, start):
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 2**32))
    print(f"KILL_SEED={seed}")
    chance = random.Random(seed)
    signals = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT]
    sweep = start(range(RUNS))
    begun = time.monotonic()
    for _ in range(40):
        if sweep.poll() is not None:
            sweep, begun = start(range(RUNS)), time.monotonic()
        # One in two in the first two seconds, in which kernels start; the runs are short.
        moment = chance.uniform(0.0, 2.0) if chance.random() < 0.5 else chance.uniform(0.0, 4.0)
        while time.monotonic() - begun < moment and sweep.poll() is None:
            time.sleep(0.01)
        begun = time.monotonic()
        some = kernels(sweep)
        if some and chance.random() < 0.4:
            try:
                chance.choice(some).send_signal(signal.SIGKILL)
            except psutil.Error:
                pass
        elif sweep.poll() is None:
            sweep.send_signal(chance.choice(signals))
            if chance.random() < 0.5:  # the next command comes before this one is gone
                sweep.wait(30)
            sweep, begun = start(range(RUNS)), time.monotonic()
        if (place / "runs" / "small" / "sweep.json").exists():
            for run in read_sweep(place / "runs" / "small")[1]:  # whole at any moment
                if run.status == "done":
                    assert [record.name for record in run.records] == ["begin", "square"]
    sweep.wait(120)
    for _ in range(4):  # what was killed last is done by the next
        if start(range(RUNS)).wait(120) == 0:
            break
    log = (place / "log.txt").read_text()
    runs = read_sweep(place / "runs" / "small")[1]
    assert [run.spec.parameters["number"] for run in runs] == list(range(RUNS))
    assert {run.status for run in runs} == {"done"}, log
    for run in runs:
        number = run.spec.parameters["number"]
        figures = [(record.name, record.value) for record in run.records]
        assert figures == [("begin", number), ("square", number**2)]
    assert set(executions(place, "ends")) == set(range(RUNS))
    # An interrupt may come before the command can speak.
    tracebacks = log.split("Traceback (most recent call last)")[1:]
    assert all("\nKeyboardInterrupt" in each for each in tracebacks), log
    assert leftovers(place) == []
    litter = {path.name for path in (place / "runs" / "small").rglob("*")}
    assert not {name for name in litter if "partial" in name or name == "running"}
    ended = executions(place, "ends")
    assert start(range(RUNS)).wait(60) == 0 and executions(place, "ends") == ended


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_sweep_that_is_ended_while_its_kernels_start_loses_no_run(place, start, number):
    sweep = start([1, 2])
    until(lambda: len(kernels(sweep)) == 2)
    sweep.send_signal(number)
    code = sweep.wait(30)
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    until(lambda: leftovers(place) == [], 10)
    assert executions(place, "ends") == [] and statuses(place) == ["not run"] * 2
    assert start([1, 2]).wait(60) == 0
    assert sorted(executions(place, "ends")) == [1, 2] and statuses(place) == ["done"] * 2


def test_a_sweep_ends_with_its_kernels_and_all_they_started(place, start):
    sweep = start([1, 2], seconds=60.0, child="true")
    until(lambda: len(executions(place, "begins")) == 2)
    until(lambda: len(kernels(sweep)) == 4)
    sweep.send_signal(signal.SIGTERM)
    assert sweep.wait(30) == 130
    assert leftovers(place) == []
    assert "Interrupted. What has ended is kept." in (place / "log.txt").read_text()


def test_what_a_kernel_started_and_a_killed_sweep_left_is_ended_by_the_next(place, start):
    sweep = start([1], seconds=60.0, child="true")
    (kernel, child) = until(lambda: len(both := kernels(sweep)) == 2 and both)
    assert child.ppid() == kernel.pid
    sweep.kill()
    sweep.wait()
    until(lambda: not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE, 5)
    assert child.is_running()
    again = start([1], seconds=60.0, child="true")
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    again.terminate()
    again.wait(30)


def test_a_kernel_that_is_killed_while_it_starts_is_no_failure_of_its_notebook(place, start):
    sweep = start([1, 2])
    for kernel in until(lambda: len(found := kernels(sweep)) == 2 and found):
        kernel.kill()
    assert sweep.wait(60) == 1
    assert set(statuses(place)) == {"killed"}
    assert start([1, 2]).wait(60) == 0
    assert statuses(place) == ["done"] * 2


def test_a_restarting_sweep_may_be_killed_again_and_again(place, start):
    sweep = start([1], seconds=60.0, child="true")
    until(lambda: len(kernels(sweep)) == 2)
    for pause in (0.0, 0.1, 0.3, 0.6, 1.0):
        sweep.kill()
        sweep.wait()
        sweep = start([1], seconds=60.0, child="true")
        time.sleep(pause)
    sweep.kill()
    sweep.wait()
    assert start([1], seconds=0.1).wait(60) == 0
    until(lambda: leftovers(place) == [], 10)


def test_somebody_elses_kernel_is_never_killed(place, start):
    # What a sweep of another time left: the number of its kernel, which another process has now.
    stranger = subprocess.Popen(
        [sys.executable, "-m", "ipykernel_launcher", "-f", str(place / "mine.json")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
    )
    try:
        sweep = start([1], seconds=60.0)
        until(lambda: kernels(sweep))
        sweep.kill()
        sweep.wait()
        (running,) = (place / "runs" / "small").glob("*/running")
        for name in ("kernel.pid", "pid"):
            (running / name).write_text(str(stranger.pid))
            (running.parent / name).write_text(str(stranger.pid))
        again = start([1], seconds=60.0)
        until(lambda: executions(place, "begins"))
        again.send_signal(signal.SIGINT)
        assert again.wait(30) == 130
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_kernel_killed_before_it_has_a_group_of_its_own_does_not_take_the_sweep_along(place):
    plan = """
import os, sys
from pathlib import Path
from rich.console import Console
from nbsweep import carry_out, plan_file

os.getpgid = lambda pid: os.getpgrp()  # what the system says of such a kernel
file = Path("small.toml")
file.write_text('[[runs]]\\nnotebook = "01"\\nset.number = 1\\n')
runs, _ = carry_out(plan_file(file), "runs", 1, Console(quiet=True))
print([run.status for run in runs])
"""
    done = subprocess.run(
        [sys.executable, "-c", plan],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
    )
    assert (done.returncode, done.stdout) == (0, "['done']\n"), done.stderr
