"""An error of one rank alone: the others say which and what, instead of waiting for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from glm4v_nb.miniature import CHECKPOINT, EXAMPLES

PROGRAM = Path(__file__).parents[1] / "support" / "failing_rank.py"
ERRORS = {
    "before joining": "ValueError: no/such: revision is None",
    "in loading": "OSError: a bad disk",
    "unreadable picture": "FileNotFoundError: ",
    "out of memory": "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.",
    "a card that waits": "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.",
}


def torchrun(*command):
    """Two ranks of it, and how torchrun ended."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    run += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run(
        [*run, *command], capture_output=True, text=True, env=environment, timeout=240, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two ranks have left how each case ended for them."""
    folder = tmp_path_factory.mktemp("ranks")
    ended = torchrun(PROGRAM, folder, *ERRORS, "alike")
    assert not ended.returncode, ended.stderr
    return folder


def seen(folder, how):
    return [json.loads((folder / f"{how} {rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("how", ERRORS)
def test_the_others_learn_which_rank_failed_and_how(folder, how):
    first, second = seen(folder, how)
    kind, _, words = ERRORS[how].partition(": ")
    assert (second["error"], second["text"][: len(words)]) == (kind, words)
    assert second["notes"] == ["Rank 1 of 2 failed, and all end with it."]
    assert second["seconds"] < 30
    told = f"Rank 1 of 2 failed, and all end with it: {ERRORS[how]}"
    if how == "a card that waits":  # its process is ended, with the line
        assert first is None and (folder / f"{how} 0.status").read_text() == "1"
        assert (folder / f"{how} 0.stderr").read_text() == f"error: {told}\n"
    else:
        assert first["error"] == "RankLost" and first["text"].startswith(told)
        assert first["seconds"] < 30


def test_ranks_that_fail_alike_go_on_together(folder):
    assert [each["answer"] for each in seen(folder, "alike")] == ["0", "0"]


def test_the_command_says_in_one_line_which_rank_failed(tmp_path):
    """The first alone; the second finds its picture."""
    (tmp_path / "1").symlink_to(EXAMPLES / "five_shapes.png")
    program = tmp_path / "ask.py"
    program.write_text(
        "import os, sys\n"
        "from glm4v_nb.cli import main\n"
        f"sys.exit(main(['ask', {str(CHECKPOINT)!r}, 'How many crosses are there?', '--image',"
        f" {str(tmp_path)!r} + '/' + os.environ['RANK'], '--dtype', 'float32']))\n"
    )
    ended = torchrun(program)
    assert ended.returncode and ended.stdout == ""
    (line,) = [line for line in ended.stderr.split("\n") if line.startswith("error:")]
    assert line.startswith("error: Rank 0 of 2 failed, and all end with it.")
    assert f"{tmp_path}/0 is not a file" in line
