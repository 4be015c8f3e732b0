"""Sweeps on a Dask cluster of processes: they end as on one machine, and nothing is lost whoever is
killed when."""

import io
import json
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from dask_cluster import ROOT, dask, end, environment, gone, write_notebooks
from rich.console import Console
from waiting import until

from nbsweep import cli, runner
from nbsweep import dask as cluster
from nbsweep.plan import Plan, plan_file
from nbsweep.registry import NotebookEntry
from nbsweep.store import SweepError, read_sweep

# Kernels start slowly on a busy machine; only what hangs has so little time.
TIMEOUT = 5
PACKAGES = ["nbsweep"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with notebooks, and with what the cluster's processes leave."""
    folder = tmp_path_factory.mktemp("dask")
    write_notebooks(folder / "notebooks")
    return folder


SCHEDULER = "--host 127.0.0.1 --port 0 --no-dashboard --scheduler-file".split()


@pytest.fixture(scope="module")
def address(place):
    """A scheduler, a worker that offers a GPU and one that does not, each of one thread."""
    file = place / "scheduler.json"
    # A run may lose its worker once; by default three times.
    settings = environment(
        EXECUTIONS=str(place / "executions.txt"), DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="1"
    )
    processes = [dask("scheduler", *SCHEDULER, str(file), env=settings, cwd=place)]
    options = (
        "--scheduler-file",
        str(file),
        "--nthreads",
        "1",
        "--no-dashboard",
        "--local-directory",
        str(place),
    )
    processes.append(
        dask(
            "worker", *options, "--resources", "GPU=1", env=settings | {"CUDA_VISIBLE_DEVICES": "0"}
        )
    )
    processes.append(dask("worker", *options, env=settings | {"CUDA_VISIBLE_DEVICES": ""}))
    from distributed import Client

    until(file.exists)
    with Client(scheduler_file=str(file), set_as_default=False) as client:
        client.wait_for_workers(2, timeout=60)
        yield client.scheduler.address
    for process in processes:
        end(process)


@pytest.fixture
def output(tmp_path, place):
    """A folder for results, with no executions before."""
    (place / "executions.txt").unlink(missing_ok=True)
    return tmp_path / "runs"


def make_plan(place, *settings, notebook="01"):
    text = ""
    for row in settings:
        text += f'[[runs]]\nnotebook = "{notebook}"\n'
        text += "".join(f"set.{name} = {json.dumps(value)}\n" for name, value in row.items())
        if row.get("mode") == "hung":
            text += f"timeout_seconds = {TIMEOUT}\n"
    file = place / "small.toml"
    file.write_text(text)
    return plan_file(file, place / "notebooks" / "registry.toml")


def carry_out(plan, output, address):
    shown = io.StringIO()
    runs, _ = runner.carry_out(plan, output, 2, Console(file=shown, width=300), scheduler=address)
    return runs, shown.getvalue()


def executions(place, word) -> list[tuple[int, int]]:
    """Number and process of those that began or ended."""
    path = place / "executions.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(line.split()[0]), int(line.split()[2])) for line in lines if f" {word} " in line]


def test_runs_end_on_a_cluster_as_they_do_on_this_machine(place, output, address, monkeypatch):
    modes = ("done", "oom", "failed", "killed", "hung")
    plan = make_plan(place, *({"number": 3, "mode": mode} for mode in modes))
    runs, shown = carry_out(plan, output, address)
    outcomes = {run.spec.parameters["mode"]: run.outcome for run in runs}
    assert [outcomes[mode].status for mode in modes] == [
        "done",
        "oom",
        "failed",
        "killed",
        "timeout",
    ]
    assert (outcomes["oom"].oom.device, outcomes["oom"].oom.short_bytes) == (1, 2**30)
    assert outcomes["failed"].signature == "ValueError: number # at <object object at #x…> of …"
    assert outcomes["hung"].error == f"stopped after {TIMEOUT} seconds, its timeout_seconds"
    assert [(record.name, record.value) for record in runs[0].records[1:]] == [("square", 9)]
    for run in runs:
        names = {path.name for path in (output / "small" / run.spec.id).iterdir()}
        # A kernel may say that it was interrupted as it was ended; that is kept too.
        assert names - {"executed.kernel.log"} == {
            "spec.json",
            "outcome.json",
            "records.jsonl",
            "executed.ipynb",
            "executed.html",
        }
        assert run.outcome.status in shown
    monkeypatch.setenv("EXECUTIONS", str(place / "executions.txt"))
    again, _ = carry_out(plan, output, None)
    assert again[:3] == runs[:3] and again[4] == runs[4], (
        "what has ended there is not repeated here"
    )
    assert len(executions(place, "begins")) == len(modes) + 1, "what was killed is"
    for here, there in zip(carry_out(plan, output / "here", None)[0], runs, strict=True):
        changed = {"started", "seconds", "error", "traceback"}  # times and addresses
        assert here.outcome.model_dump(exclude=changed) == there.outcome.model_dump(exclude=changed)
        assert [each.name for each in here.records] == [each.name for each in there.records]


def test_a_run_that_needs_a_gpu_gets_one_and_one_that_no_worker_can_do_is_not_run(
    place, output, address, monkeypatch
):
    monkeypatch.setattr(cluster, "PATIENCE_SECONDS", 1.0)
    runs, _ = carry_out(
        make_plan(place, {"number": 1}, {"number": 2}, notebook="02"), output, address
    )
    assert [run.records[0].value for run in runs] == ["0", "0"], "both on the worker that offers it"
    (run,), shown = carry_out(
        make_plan(place, {"number": 1}, notebook="03"), output / "two", address
    )
    assert run.outcome.status == "not run"
    assert run.outcome.error == (
        "no worker that offers GPU=2 in 1 s, 2 others. Start one, with its machine's address for"
        " HOST: "
        f"dask worker {address} --host HOST --dashboard-address HOST:0 --nthreads 1"
        ' --resources "GPU=2"'
    )
    assert "waiting for a worker that offers GPU=2" in shown
    assert executions(place, "begins")[2:] == []


RUNNER = """
import sys
from rich.console import Console
from nbsweep import carry_out, plan_file
assert "distributed" not in sys.modules  # who does not ask for a cluster need not have Dask
carry_out(plan_file(sys.argv[1], sys.argv[2]), sys.argv[3], 1, Console(), scheduler=sys.argv[4])
"""


def test_a_client_that_is_killed_leaves_nothing_running_and_the_next_one_goes_on(
    place, output, address
):
    plan = make_plan(place, {"number": 1}, {"number": 2, "mode": "slow at first"})
    arguments = [place / "small.toml", place / "notebooks" / "registry.toml", output, address]
    runner = subprocess.Popen(
        [sys.executable, "-c", RUNNER, *map(str, arguments)],
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    until(
        lambda: len(executions(place, "begins")) == 2 and list(output.glob("small/*/outcome.json"))
    )
    runner.kill()
    runner.wait()
    kernel = dict(executions(place, "begins"))[2]
    until(lambda: gone(kernel), 10)
    assert [run.outcome and run.outcome.status for run in read_sweep(output / "small")[1]] == [
        "done",
        None,
    ]
    runs, _ = carry_out(plan, output, address)
    assert [run.outcome.status for run in runs] == ["done", "done"]
    assert [number for number, _ in executions(place, "begins")] in ([1, 2, 2], [2, 1, 2])
    assert len(executions(place, "ends")) == 2


def test_an_interrupt_ends_what_runs_on_the_workers(place, output, address):
    plan = make_plan(place, {"number": 1, "mode": "slow at first"})

    def interrupt(progress):
        if list(progress.running.values()) == [(3, 4)]:  # as the worker has told it
            raise KeyboardInterrupt

    with cluster.connect(address, PACKAGES) as client, pytest.raises(KeyboardInterrupt):
        runner.run_sweep(plan, output, executor=cluster.Cluster(client, plan), show=interrupt)
    kernel = executions(place, "begins")[0][1]
    until(lambda: gone(kernel), 10)
    assert read_sweep(output)[1][0].outcome is None


def test_a_worker_with_another_package_is_refused_before_anything_starts(
    place, output, address, tmp_path
):
    from distributed import Client

    shutil.copytree(
        ROOT / "nbsweep", tmp_path / "nbsweep", ignore=shutil.ignore_patterns("__pycache__")
    )
    with (tmp_path / "nbsweep" / "words.py").open("a") as file:
        file.write("# another\n")
    options = (address, "--nthreads", "1", "--no-nanny", "--no-dashboard", "--name", "other")
    other = dask("worker", *options, env=environment(PYTHONPATH=str(tmp_path)), cwd=tmp_path)
    try:
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(3, timeout=60)
        with pytest.raises(
            SweepError,
            match=r"nbsweep: not the same everywhere: tcp://127.0.0.1:\d+ has source \w+; expected",
        ):
            carry_out(make_plan(place, {"number": 1}), output, address)
    finally:
        end(other)
    assert not output.exists() and executions(place, "begins") == []


def test_a_host_that_cannot_do_runs_stops_the_sweep_and_is_named(place, output, address, tmp_path):
    plan = make_plan(place, {"number": 1})
    wrong = plan.specs[0].model_copy(update={"package": "0" * 16})  # as if it had joined later
    plan = Plan(plan.name, [wrong], plan.notebooks)
    with (
        cluster.connect(address, PACKAGES) as client,
        pytest.raises(SweepError, match="worker tcp.* has another nbsweep"),
    ):
        runner.run_sweep(plan, output, executor=cluster.Cluster(client, plan))
    assert read_sweep(output)[1][0].outcome is None


def test_a_checkpoint_must_be_the_same_on_the_host(place, output, address, monkeypatch):
    plan = make_plan(place, {"number": 1})
    parameters = {"parameters": {"checkpoint": "models/a"}}
    plan = Plan(plan.name, [plan.specs[0].model_copy(update=parameters)], plan.notebooks)
    monkeypatch.setattr(
        cluster, "checkpoint_sizes", lambda parameters, folder: {"model.safetensors": 5}
    )
    with (
        cluster.connect(address, PACKAGES) as client,
        pytest.raises(SweepError, match="another checkpoint.* at models/a"),
    ):
        runner.run_sweep(plan, output, executor=cluster.Cluster(client, plan))


def test_a_disk_that_is_full_here_stops_the_sweep_and_the_next_one_does_the_run(
    place, output, address, monkeypatch
):
    plan = make_plan(place, {"number": 1})

    def full(folder, outcome, files=None):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runner, "keep", full)
    with pytest.raises(SweepError, match="could not be written: .*No space left on device"):
        carry_out(plan, output, address)
    assert read_sweep(output / "small")[1][0].outcome is None
    monkeypatch.undo()
    assert carry_out(plan, output, address)[0][0].outcome.status == "done"


def test_work_of_a_worker_that_is_killed_is_done_elsewhere_once(place, output, address):
    plan = make_plan(place, {"number": 1, "mode": "slow at first"}, {"number": 2}, {"number": 3})
    with ThreadPoolExecutor(1) as pool:
        swept = pool.submit(carry_out, plan, output, address)
        kernel = until(lambda: dict(executions(place, "begins")).get(1))
        worker = psutil.Process(kernel).parent()
        assert "dask" in " ".join(worker.cmdline()) or "spawn_main" in " ".join(worker.cmdline())
        worker.kill()
        until(lambda: gone(kernel), 10)
        runs, _ = swept.result(timeout=60)
    assert [run.outcome.status for run in runs] == ["done"] * 3
    assert sorted(number for number, _ in executions(place, "begins")) == [1, 1, 2, 3]
    assert sorted(number for number, _ in executions(place, "ends")) == [1, 2, 3]
    assert [len(run.records) for run in runs] == [2, 2, 2]


def test_a_run_that_every_worker_dies_of_is_killed_and_those_behind_it_are_done(
    place, output, address
):
    settings = ({"number": 1, "mode": "kills the Dask worker"}, {"number": 2})
    runs, _ = carry_out(
        make_plan(place, *settings, notebook="02"), output, address
    )  # on the one with a GPU
    assert [run.outcome.status for run in runs] == ["killed", "done"]
    assert runs[0].outcome.error == "2 workers died one after the other while they did it"


def test_a_scheduler_that_dies_ends_the_sweep_and_says_so_in_one_line(place, output, caplog):
    file = place / "other.json"
    scheduler = dask("scheduler", *SCHEDULER, str(file), env=environment(), cwd=place)
    plan = make_plan(place, {"number": 1})
    try:
        until(file.exists)
        address = json.loads(file.read_text())["address"]

        def kill(progress):
            if "waiting for a worker" in progress.notes:
                scheduler.kill()

        with pytest.raises(
            SweepError, match="is gone .*run the same command again; what has ended is kept"
        ):
            with cluster.connect(address, PACKAGES) as client:
                runner.run_sweep(plan, output, executor=cluster.Cluster(client, plan), show=kill)
        assert caplog.text == ""
    finally:
        end(scheduler)


def test_a_scheduler_that_does_not_answer_is_an_error_before_anything_starts(
    place, output, monkeypatch, capsys
):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    plan = make_plan(place, {"number": 1})
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        with pytest.raises(
            SweepError,
            match="no Dask scheduler answers at tcp://.*Timed out .*dask scheduler --protocol tcp"
            r" --host 127.0.0.1 --port \d+ --dashboard-address 127.0.0.1:8787",
        ):
            carry_out(plan, output, f"tcp://127.0.0.1:{silent.getsockname()[1]}")
        silent.listen()
        with pytest.raises(
            SweepError, match="accepts connections, but does not answer as Dask does"
        ):
            carry_out(plan, output, f"tcp://127.0.0.1:{silent.getsockname()[1]}")
    assert not output.exists()
    file = ROOT / "sweeps" / "precision.toml"
    wrong = [
        "sweep",
        str(file),
        "--scheduler",
        "10.0.0.1",
        "--workers",
        "3",
        "--output",
        str(output),
    ]
    assert cli.main(wrong) == 2
    said = capsys.readouterr().err
    assert "--scheduler is '10.0.0.1'; expected an address such as tcp://10.0.0.1:8786" in said
    assert "--workers 3 is not used: the cluster decides" in said


def test_without_dask_the_option_says_how_to_install_it(place, output, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.delitem(sys.modules, "nbsweep.dask")
    with pytest.raises(SweepError, match="--scheduler needs Dask.*pip install distributed"):
        carry_out(make_plan(place, {"number": 1}), output, "tcp://127.0.0.1:8786")


@pytest.mark.parametrize(
    ("hardware", "gpus", "needs"),
    [
        ("simulated", 0, False),
        ("any", 0, False),
        ("simulated or 1+ GPUs", 1, False),
        ("1 GPU", 1, True),
        ("2+ GPUs", 2, True),
    ],
)
def test_the_registry_says_how_many_gpus_a_run_asks_for(hardware, gpus, needs):
    entry = NotebookEntry(
        file="01_a.ipynb", title="A", tier="core", hardware=hardware, timeout_seconds=1, minutes=1
    )
    assert (entry.gpus, entry.needs_gpus) == (gpus, needs)
