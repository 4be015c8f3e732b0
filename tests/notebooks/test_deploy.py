"""The files of the deployment lesson: the script runs, systemd and Docker get what they name."""

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from glm4v_nb.cli import main
from glm4v_nb.miniature import CHECKPOINT

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "notebooks" / "deploy"
PICTURE = CHECKPOINT.with_name("examples") / "two_shapes.png"
QUESTION = ["--image", PICTURE, "--question", "How many objects are there?"]


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(DEPLOY / "deploy.py"))


@pytest.fixture
def deploy(script, tmp_path, monkeypatch, capsys):
    """Run it in this process, as importing torch again takes seconds: what it ends with, and what
    it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["deploy.py", *map(str, arguments)])
        try:
            code = script["main"]()
        except SystemExit as ended:  # of argparse
            code = ended.code
        return code, capsys.readouterr().out

    return run


def test_the_script_answers_and_logs_what_each_stage_took(deploy, tmp_path):
    code, out = deploy(CHECKPOINT, *QUESTION, "--room-gib", 0.25, "--expect", 2)
    assert code == 0
    answer, ended, peak, provenance = out.splitlines()
    assert answer == "2"
    assert ended.startswith("end after 3 tokens")
    assert re.search(r": peak \d+\.\d\d GiB", peak)
    assert provenance.startswith("measured on ")
    log = (tmp_path / "stages.jsonl").read_text()
    assert re.findall(r'"stage": "(\w+)"', log) == ["load", "answer"]


def test_another_answer_than_the_expected_one_is_a_failure(deploy):
    code, _ = deploy(CHECKPOINT, *QUESTION, "--room-gib", 0.25, "--expect", "seven")
    assert code == "not the expected answer 'seven'"


def test_on_simulated_cards_the_script_says_what_each_would_hold(deploy):
    official = ("zai-org/glm-4v-9b", "--simulate", "L4", "--max-new-tokens", 1)
    code, out = deploy(*official, "--count", 2)
    assert code == 0
    peaks = [float(peak) for peak in re.findall(r"L4 \d: peak ([\d.]+) GiB", out)]
    assert len(peaks) == 2
    assert sum(peaks) > 25.9, "the weights, and what a prompt needs"
    assert out.endswith("simulated\n")
    code, _ = deploy(*official, "--count", 1)
    assert code.startswith("Not deployed: no room within")


def test_a_picture_that_is_not_there_is_wrong_use(deploy):
    assert deploy(CHECKPOINT, "--image", "no.png")[0] == 2


@pytest.mark.parametrize("unit", ["glm4v.service", "glm4v-serve.service"])
def test_systemd_finds_no_fault_with_the_unit(unit):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    command = ["systemd-analyze", "verify", DEPLOY / unit]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    # The environment, which does not exist here, is the one thing it may miss.
    missing = re.compile(r"venv/bin/[\w-]+ is not executable")
    assert [line for line in lines if not missing.search(line)] == []


def test_the_unit_gives_the_script_options_that_it_knows(deploy):
    unit = (DEPLOY / "glm4v.service").read_text().replace("\\\n", " ")
    (line,) = re.findall("^ExecStart=(.*)$", unit, re.MULTILINE)
    words = shlex.split(line)
    assert words[1:3] == ["deploy.py", "glm-4v-9b"]
    known = set(re.findall(r"--[a-z-]+", deploy("--help")[1]))
    assert {word for word in words if word.startswith("--")} <= known


def test_the_unit_and_the_container_give_the_service_options_that_it_knows(capsys):
    unit, image = ((DEPLOY / name).read_text() for name in ("glm4v-serve.service", "Dockerfile"))
    (line,) = re.findall("^ExecStart=(.*)$", unit.replace("\\\n", " "), re.MULTILINE)
    (served,) = re.findall(r"--entrypoint glm4v-nb glm4v (serve .*)$", image, re.MULTILINE)
    assert main(["serve", "--help"]) == 0
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    for words in (shlex.split(line)[1:], shlex.split(served)):
        assert words[:2] == ["serve", "glm-4v-9b"]
        assert {word for word in words if word.startswith("--")} <= known
        assert "--host" in words, "with a key, which is read from a file or from the environment"


def test_the_image_is_given_files_that_make_a_package(tmp_path):
    """Docker itself is not run: what it would copy is built here."""
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    instructions = [line.split() for line in lines if line and not line.startswith("#")]
    assert {words[0] for words in instructions} == {
        "FROM", "WORKDIR", "COPY", "RUN", "ENV", "ENTRYPOINT",
    }  # fmt: skip
    skipped = shutil.ignore_patterns("__pycache__")
    for _, *sources, target in (words for words in instructions if words[0] == "COPY"):
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, tmp_path / target, ignore=skipped)
            else:
                shutil.copy(ROOT / source, tmp_path)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "."]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("*.whl"))


def test_the_download_that_the_lesson_shows_has_options_that_hf_knows():
    cells = nbformat.read(ROOT / "notebooks" / "14_deploy_step_by_step.ipynb", as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    (command,) = re.findall(r"^hf download .*$", text, re.MULTILINE)
    program = Path(sys.executable).with_name("hf")
    known = subprocess.run([program, "download", "--help"], capture_output=True, text=True).stdout
    for option in re.findall(r" (--[a-z-]+)", command):
        assert f"{option} " in known, option
    assert "--revision" in command
