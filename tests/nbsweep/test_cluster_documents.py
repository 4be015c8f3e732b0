"""The Dask commands of the documents, started as they stand there: who can reach what they open."""

import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from dask_cluster import ROOT, end, environment, free_port, write_notebooks
from waiting import until

from nbsweep.store import read_sweep

GUIDE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
PLAIN, TLS = GUIDE.split("## With TLS")
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]
DOCUMENTS += [*ROOT.glob("notebooks/**/*.ipynb"), *ROOT.glob("nbsweep/*.py")]


def test_every_dask_command_that_anybody_is_told_names_the_two_addresses_it_listens_on():
    commands = []
    for path in DOCUMENTS:
        # In Python, a message may be put together from several lines.
        text = re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8"))
        commands += re.findall(r"dask (?:scheduler|worker) (?:[-t{].*)", text)
    assert len(commands) == 9, "5 in the guide, 2 in a lesson, 2 that errors tell"
    for command in commands:
        assert "--host " in command and "--dashboard-address " in command, command


def commands_of(text: str, ports: dict[str, int]) -> list[str]:
    """The scheduler's and the first worker's, on this machine's own address and free ports."""
    lines = [line for line in text.splitlines() if ".venv/bin/dask " in line][:2]
    for port, free in ports.items():
        lines = [line.replace(port, str(free)) for line in lines]
    dask = str(Path(sys.executable).with_name("dask"))
    lines = [re.sub(r"10\.0\.0\.\d", "127.0.0.1", line) for line in lines]
    return [f"env {line.replace('.venv/bin/dask', dask)}" for line in lines]


@pytest.fixture
def start(tmp_path):
    """Starts commands of a text of the guide in a folder of their own; returns their processes."""
    started = []

    def start(text, ports, **variables):
        for command in commands_of(text, ports):
            log = (tmp_path / "log.txt").open("ab")
            started.append(
                subprocess.Popen(
                    ["sh", "-c", f"exec {command}"], cwd=tmp_path, stdout=log, stderr=log,
                    env=environment(**variables), start_new_session=True,
                )
            )  # fmt: skip
        return started

    yield start
    for process in reversed(started):
        end(process)


def listening(processes) -> list[tuple[str, int]]:
    """Addresses at which processes and their children can be reached."""
    found = []
    for process in processes:
        root = psutil.Process(process.pid)
        for member in (root, *root.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):  # helpers of a start come and go
                connections = member.net_connections("inet")
                found += [each.laddr[:2] for each in connections if each.status == "LISTEN"]
    return found


def test_a_cluster_as_documented_is_reached_at_the_addresses_it_was_given_alone(start):
    ports = {"8786": free_port(), "8787": free_port()}
    processes = start(PLAIN, ports)
    # Two of the scheduler, one of the worker's guard, two of the worker.
    found = until(lambda: len(some := listening(processes)) == 5 and some, 60)
    assert {address for address, _ in found} == {"127.0.0.1"}
    assert set(ports.values()) <= {port for _, port in found}


SWEEP = """
import sys
from rich.console import Console
from nbsweep import carry_out, plan_file
file, registry, output, *addresses = sys.argv[1:]
for address in addresses:
    try:
        runs, _ = carry_out(plan_file(file, registry), output, 1, Console(), scheduler=address)
        print([run.status for run in runs])
    except RuntimeError as error:
        print(error)
"""


def test_with_tls_as_documented_a_sweep_is_done_and_a_client_without_the_key_is_refused(
    start, tmp_path
):
    if shutil.which("openssl") is None:
        pytest.skip("not run: there is no openssl here (Debian: apt-get install openssl)")
    for line in re.findall(r"^(?:openssl|chmod) .*$", TLS, flags=re.MULTILINE):
        subprocess.run(["sh", "-c", line], cwd=tmp_path, check=True, capture_output=True)
    (settings,) = re.findall(r"```yaml\n(.*?)```", TLS, flags=re.DOTALL)
    (tmp_path / "dask-tls.yaml").write_text(settings)
    (variable,) = re.findall(r"export (DASK_CONFIG)=dask-tls.yaml", TLS)
    known = {variable: "dask-tls.yaml"}
    ports = {"8786": free_port(), "8787": free_port()}
    place = tmp_path / "executions.txt"
    processes = start(TLS, ports, EXECUTIONS=str(place), **known)
    found = until(lambda: len(some := listening(processes)) == 5 and some, 60)
    assert {address for address, _ in found} == {"127.0.0.1"}
    registry = write_notebooks(tmp_path / "notebooks")
    (tmp_path / "small.toml").write_text('[[runs]]\nnotebook = "01"\nset.number = 3\n')

    def sweep(*schemes, **variables):
        addresses = [f"{scheme}://127.0.0.1:{ports['8786']}" for scheme in schemes]
        arguments = [tmp_path / "small.toml", registry, tmp_path / "runs", *addresses]
        command = [sys.executable, "-c", SWEEP, *map(str, arguments)]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(**variables), capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    plain, without_key = sweep("tcp", "tls")
    assert plain.startswith("no Dask scheduler answers at tcp://127.0.0.1")
    assert "there is no certificate for tls:// in Dask's configuration, DASK_CONFIG" in without_key
    assert not (tmp_path / "runs").exists()
    plain, *_, done = sweep("tcp", "tls", **known)
    assert "encryption required by Dask configuration" in plain
    assert done == "['done']"
    assert [run.status for run in read_sweep(tmp_path / "runs" / "small")[1]] == ["done"]
