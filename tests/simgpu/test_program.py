"""``simgpu run``: somebody's script on simulated cards, to its first steps."""

import json
import re
import sys

import pytest

from simgpu.cli import main

SCRIPT = """\
import argparse
import sys

import torch
from shapes import WIDTH


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--fail", action="store_true")
    options = parser.parse_args()
    width = options.scale * WIDTH
    model = torch.nn.Linear(width, width, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    for step in range(1000):
        loss = model(torch.rand(2, width).cuda()).mean()
        loss.backward()
        if options.fail:
            raise LookupError("of the script's own")
        optimizer.step()
        optimizer.zero_grad()
        print("step", step, loss.item(), sys.argv[1:])


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def command(tmp_path, capfd, monkeypatch):
    """Run ``simgpu`` in a folder with a script: exit code, stdout, stderr."""
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "shapes.py").write_text("WIDTH = 1024\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "shapes", raising=False)

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_script_runs_to_its_second_step_and_every_part_of_its_peak_is_told(command):
    before = list(sys.argv), list(sys.path)
    code, out, err = command("run", "--card", "L4", "--json", "a.json", "train.py", "--scale", "4")
    assert (code, err) == (0, "")
    assert re.findall(r"^step .*", out, re.MULTILINE) == ["step 0 0.0 ['--scale', '4']"]
    assert "train.py, 2 steps" in out and "It fits: card 0 is the fullest" in out
    assert "train.py:14" in out and 'model = torch.nn.Linear(width, width, device="cuda")' in out
    with open("a.json", encoding="utf-8") as file:
        answer = json.load(file)
    weights = 4 * 4096 * 4096
    purposes = answer["devices"][0]["by_purpose"]
    assert purposes["optimizer"] == pytest.approx(weights, rel=0.01)
    assert purposes["gradients"] == pytest.approx(weights, rel=0.01)
    assert (answer["steps"], answer["assumed"], answer["exact"]) == (2, {"item": 1}, True)
    assert (sys.argv, sys.path) == before


def test_out_of_memory_is_pytorchs_error_at_the_scripts_line_and_exit_code_3(command):
    code, out, err = command("run", "--card", "L4", "--steps", 1, "train.py", "--scale", "80")
    assert code == 3
    assert 'File "train.py", line 14, in main\n' in err
    assert err.splitlines()[-1].startswith("torch.OutOfMemoryError: CUDA out of memory.")
    assert "simgpu/device.py" not in err, "no frame of the simulation"
    assert re.search(r"It does not fit: card 0 is full\. It needs \d\d\.\d\d GiB, ", out)
    assert "step" not in out.replace("steps", ""), "the second run is silent"


def test_the_scripts_own_error_is_shown_as_python_would_and_is_exit_code_1(command):
    code, out, err = command("run", "--card", "L4", "train.py", "--fail")
    assert (code, out) == (1, "")
    lines = err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1].startswith('  File "train.py", line 27')
    assert lines[-1] == 'LookupError: "of the script\'s own"' or "of the script's own" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train.py"], "Missing option '--card'"),
        (["--card", "L5", "train.py"], "'L5' is not in the catalogue"),
        (["--card", "L4", "no.py"], "There is no script 'no.py'"),
        (["--card", "L4", "--steps", "0", "train.py"], "steps is 0"),
        (["--card", "L4", "--cards", "L4,T4", "train.py"], "leave --card, --count"),
        (["--card", "L4", "--free-gib", "much", "train.py"], "expected GiB, as 10"),
        (["--card", "L4", "--free-gib", "99", "train.py"], "at most the 22.03 GiB of NVIDIA L4"),
        (["--card", "L4", "--assume", "all", "train.py"], "assume is 'all'"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(command, arguments, said):
    code, out, err = command("run", *arguments)
    assert (code, out) == (2, "")
    assert said in err and err.count("\n") == 1


def test_an_interrupt_is_exit_code_130(command, tmp_path):
    (tmp_path / "stopped.py").write_text("raise KeyboardInterrupt\n")
    assert command("run", "--card", "L4", "stopped.py")[0] == 130


def test_a_script_that_ends_itself_is_taken_at_its_word(command, tmp_path):
    (tmp_path / "ends.py").write_text("import sys\nsys.exit(int(sys.argv[1]))\n")
    assert command("run", "--card", "L4", "ends.py", 0)[0] == 0
    code, _, err = command("run", "--card", "L4", "ends.py", 3)
    assert code == 1 and "ends.py ended itself with 3" in err
