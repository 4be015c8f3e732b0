"""What the tests of sweeps on a cluster share: a small notebook, and schedulers and workers as a
user starts them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import nbformat
import psutil
from run_cells import ENDINGS, KEEP

ROOT = Path(__file__).parents[2]
# Nothing here imports torch. It writes to $EXECUTIONS when it begins and ends, and takes $SLOW_HOST
# seconds longer.
CELLS = (
    'number = 1\nmode = "done"\nseconds = 0.0',
    f"""
import json, os, signal, subprocess, sys, time
{KEEP}
def log(word):
    with open(os.environ["EXECUTIONS"], "a") as file:
        file.write(f"{{number}} {{word}} {{os.getpid()}}\\n")

log("begins")
keep("cards", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
""",
    ENDINGS
    + """if mode == "kills the Dask worker":
    import psutil
    os.kill(psutil.Process().ppid(), signal.SIGKILL)
    time.sleep(60)
if mode == "slow at first" and open(os.environ["EXECUTIONS"]).read().count(f"{number} begins") == 1:
    time.sleep(50)
time.sleep(seconds)
time.sleep(float(os.environ.get("SLOW_HOST", 0)))
""",
    'keep("square", number * number)\nlog("ends")',
)
REGISTRY = """
[[notebook]]
file = "{file}"
title = "Small"
tier = "core"
hardware = "{hardware}"
timeout_seconds = 60
minutes = 1
"""
HARDWARE = {"01_small.ipynb": "any", "02_one_gpu.ipynb": "1+ GPUs", "03_two_gpus.ipynb": "2 GPUs"}


def write_notebooks(folder: Path) -> Path:
    """Notebooks of the same cells that need other hardware; returns their registry."""
    folder.mkdir(parents=True)
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    cells[0].metadata["tags"] = ["parameters"]
    for file in HARDWARE:
        nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / file)
    registry = folder / "registry.toml"
    registry.write_text(
        "".join(REGISTRY.format(file=file, hardware=kind) for file, kind in HARDWARE.items())
    )
    return registry


def dask(part: str, *options: str, before: tuple[str, ...] = (), **settings) -> subprocess.Popen:
    """`dask scheduler` or `dask worker`, in a session of its own; ``settings`` go to Popen."""
    command = [*before, sys.executable, "-m", f"distributed.cli.dask_{part}", *options]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, start_new_session=True, **(quiet | settings))


def environment(**more: str) -> dict[str, str]:
    """This process's with the package under test in front, and ``more``."""
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | more


def end(process: subprocess.Popen):
    """End a process and all its children, whatever they do about it."""
    try:
        family = [
            *psutil.Process(process.pid).children(recursive=True),
            psutil.Process(process.pid),
        ]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def free_port() -> int:
    """One of this machine's own address that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def gone(pid: int) -> bool:
    """Whether a process has ended, also where nobody has asked for its exit code."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
