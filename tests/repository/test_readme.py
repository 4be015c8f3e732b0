"""The README's commands and code do what the README says."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line
    for _, block in BLOCKS
    for line in block.splitlines()
    if line.startswith(".venv/bin/glm4v-nb")
]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize("command", [command for command in COMMANDS if " fit " in command])
def test_a_fit_command_of_the_readme_fits(command):
    program, *arguments = shlex.split(command)
    executable = Path(sys.executable).with_name(Path(program).name)
    done = subprocess.run(
        [executable, *arguments], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "fits" in done.stdout


def test_the_doctor_of_the_readme_finds_nothing_to_mend():
    (command,) = [command for command in COMMANDS if command.endswith(" doctor")]
    executable = Path(sys.executable).with_name(Path(command.split()[0]).name)
    done = subprocess.run(
        [executable, "doctor"], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_experiments_of_the_readme_run_and_report(tmp_path):
    runs = [
        shlex.split(command)
        for command in COMMANDS
        if re.search(r"glm4v-nb (run|sweep|report) ", command)
    ]
    assert [words[1] for words in runs] == ["run", "sweep", "sweep", "report", "sweep"]
    for words in runs:
        if words[1] == "report":  # of what the first command ran
            words[2] = str(tmp_path / "one_fit")
        elif words[1] == "sweep" and "--dry-run" not in words:
            words.append("--dry-run")  # the runs themselves take minutes
        if words[1] == "run":
            words += ["--output", str(tmp_path)]
        executable = Path(sys.executable).with_name("glm4v-nb")
        done = subprocess.run(
            [executable, *words[1:]],
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
            check=False,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "one_fit" / "report.html").is_file()


def test_the_dask_commands_of_the_readme_have_options_and_settings_that_dask_knows():
    import dask.config
    import distributed  # noqa: F401

    lines = [
        line for _, block in BLOCKS for line in block.splitlines() if ".venv/bin/dask " in line
    ]
    assert [line.partition("/dask ")[2].split()[0] for line in lines] == [
        "scheduler",
        "worker",
        "worker",
    ]
    executable = Path(sys.executable).with_name("dask")
    for line in lines[:2]:
        part = line.partition("/dask ")[2].split()[0]
        shown = subprocess.run(
            [executable, part, "--help"], capture_output=True, text=True, check=True
        ).stdout
        known = set(re.findall(r"--[a-z-]+", shown))
        assert set(re.findall(r" (--[a-z-]+)", line)) <= known, line
    for name in re.findall(r"DASK_(\w+)", README):
        assert dask.config.get(name.lower().replace("__", "."), "unknown") != "unknown", name


def run_python(marker: str) -> subprocess.CompletedProcess:
    """Run the README's Python block that contains the marker."""
    (code,) = [block for language, block in BLOCKS if language == "python" and marker in block]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def test_the_python_of_the_readme_that_asks_a_question_prints_the_answer():
    assert run_python("stream(").stdout == "4"


def test_the_python_of_the_readme_prints_both_cards():
    done = run_python("Rig(")
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all(line.startswith("NVIDIA L4 ") for line in lines)
    # Both cards' weights: 27.8 GB and the rounding of about a thousand tensors to 512 bytes.
    assert sum(int(line.rpartition(" ")[2]) for line in lines) == pytest.approx(
        27_812_641_792, abs=512 * 1100
    )


def test_the_readmes_accuracies_are_the_stored_ones():
    report = json.loads((ROOT / "benchmarks" / "results" / "miniature_evaluation.json").read_text())
    section = README.partition("## The miniature")[2].partition("\n## ")[0]
    told = [float(number) for number in re.findall(r"([\d.]+) %", section)]
    forms = [report["forms"][name]["accuracy"] for name in ("jpeg", "alpha", "grey", "wide")]
    worst = min(kind["accuracy"] for kind in report["kinds"].values())
    assert told == pytest.approx(
        [100 * share for share in (report["accuracy"], worst, *forms)], abs=0.051
    )


def test_every_make_target_of_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_readme_links_every_registered_notebook_and_no_missing_file():
    registry = tomllib.loads((ROOT / "notebooks" / "registry.toml").read_text(encoding="utf-8"))
    links = re.findall(r"\]\(((?!http)[^)]+)\)", README)
    assert {f"notebooks/{entry['file']}" for entry in registry["notebook"]} <= set(links)
    for link in links:
        assert (ROOT / link).exists(), link
