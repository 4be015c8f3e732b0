"""A sweep on hosts that share no file system, two of which are lost in the middle of a run: one's
link fails, one dies.

Each host is a network namespace with a link of its own to the one that holds scheduler and sweep.
What that one keeps is hidden from the others by an empty file system mounted over it.
"""

import json
import os
import shutil
import subprocess
import sys
import uuid

import pytest
from dask_cluster import dask, end, environment, gone, write_notebooks
from waiting import until

from nbsweep.store import read_sweep

# Seconds until a connection over a dead link counts as closed; Dask's own is 30, its least 11.
LINK_SECONDS = 11
SETTINGS = {"DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": f"{LINK_SECONDS}s"}
HOSTS = ("survives", "cut off", "dies")
SWEEP = """
import sys
from rich.console import Console
from nbsweep import carry_out, plan_file
carry_out(plan_file(sys.argv[1], sys.argv[2]), sys.argv[3], 1, Console(), scheduler=sys.argv[4])
"""


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@pytest.fixture
def network():
    """Names of namespaces: "hub" at 10.77.N.1, and the hosts at 10.77.N.2 with N from 1."""
    if os.geteuid() != 0:
        pytest.skip("not run: network namespaces need root")
    if shutil.which("ip") is None:
        pytest.skip("not run: there is no ip here (Debian: apt-get install iproute2)")
    mark = uuid.uuid4().hex[:6]
    names = {"hub": f"hub-{mark}"} | {
        host: f"host{number}-{mark}" for number, host in enumerate(HOSTS, 1)
    }
    try:
        try:
            for name in names.values():
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            for number, host in enumerate(HOSTS, 1):
                hub, peer = names["hub"], names[host]
                ip(
                    "-n",
                    hub,
                    "link",
                    "add",
                    f"to{number}",
                    "type",
                    "veth",
                    "peer",
                    "name",
                    "eth0",
                    "netns",
                    peer,
                )
                ip("-n", hub, "address", "add", f"10.77.{number}.1/24", "dev", f"to{number}")
                ip("-n", peer, "address", "add", f"10.77.{number}.2/24", "dev", "eth0")
                ip("-n", hub, "link", "set", f"to{number}", "up")
                ip("-n", peer, "link", "set", "eth0", "up")
            # A namespace with a mount hidden in it, as below.
            ip("netns", "exec", names["hub"], "mount", "-t", "tmpfs", "none", "/mnt")
        except (OSError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"not run: network namespaces are refused here ({error})")
        yield names
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.fixture
def started():
    """A list of processes, ended after the test."""
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        end(process)


def test_work_of_hosts_that_are_lost_is_done_elsewhere_and_none_lost_or_doubled(
    network, started, tmp_path
):
    hub = tmp_path / "hub"
    registry = write_notebooks(hub / "notebooks")
    (hub / "small.toml").write_text('[[runs]]\nnotebook = "01"\ngrid.number = [1, 2, 3, 4]')
    inside = ("ip", "netns", "exec", network["hub"])
    file = hub / "scheduler.json"
    options = (
        "--host",
        "0.0.0.0",
        "--port",
        "8786",
        "--no-dashboard",
        "--scheduler-file",
        str(file),
    )
    started.append(dask("scheduler", *options, before=inside, env=environment(**SETTINGS), cwd=hub))
    until(file.exists)
    folders = {}
    for number, host in enumerate(HOSTS, 1):
        folders[host] = tmp_path / host
        folders[host].mkdir()
        # The hub's folder is not there for the host.
        hidden = ("ip", "netns", "exec", network[host], "sh", "-c")
        script = f"mount -t tmpfs none '{hub}' && exec \"$@\""
        settings = SETTINGS | {
            "EXECUTIONS": str(folders[host] / "executions.txt"),
            "TMPDIR": str(folders[host]),
        }
        if host != "survives":
            settings["SLOW_HOST"] = "100"  # in the middle of its run when it is lost
        options = (f"tcp://10.77.{number}.1:8786", "--nthreads", "1", "--no-dashboard")
        started.append(
            dask(
                "worker",
                *options,
                before=(*hidden, script, "sh"),
                env=environment(**settings),
                cwd=folders[host],
            )
        )
    arguments = [hub / "small.toml", registry, hub / "runs", "tcp://127.0.0.1:8786"]
    sweep = subprocess.Popen(
        [*inside, sys.executable, "-c", SWEEP, *map(str, arguments)],
        env=environment(**SETTINGS),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    started.append(sweep)

    def executions(host, word):
        path = folders[host] / "executions.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return [tuple(map(int, line.split()[::2])) for line in lines if f" {word} " in line]

    lost = {}
    for host in ("cut off", "dies"):
        lost[host] = until(lambda host=host: executions(host, "begins"))[0]
    for host in lost:
        ip("-n", network[host], "link", "set", "eth0", "down")
    end(started[1 + HOSTS.index("dies")])
    told, _ = sweep.communicate(timeout=90)
    assert sweep.returncode == 0, told
    runs = read_sweep(hub / "runs" / "small")[1]
    assert [run.outcome.status for run in runs] == ["done"] * 4
    assert [run.records[1].value for run in runs] == [1, 4, 9, 16]
    assert sorted(number for number, _ in executions("survives", "ends")) == [1, 2, 3, 4]
    assert executions("dies", "ends") == executions("cut off", "ends") == []
    # The host without a link notices too, and ends what nobody waits for any more.
    until(lambda: gone(lost["cut off"][1]), LINK_SECONDS + 10)
    assert json.loads((hub / "runs" / "small" / "sweep.json").read_text())["name"] == "small"
