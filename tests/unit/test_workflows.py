"""The workflows for GitHub call what exists, on the Pythons the package supports."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def commands(path: Path) -> list[str]:
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()
    runs = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    return [line for run in runs for line in run.splitlines()]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_make_target_script_and_command_of_a_workflow_exists(path):
    found = commands(path)
    assert found
    for line in found:
        words = shlex.split(line)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", MAKEFILE, flags=re.MULTILINE), line
        for word in words:
            if word.startswith(("benchmarks/", "tests/", "tools/")):
                assert (ROOT / word).is_file(), line


def test_the_tests_run_on_every_python_from_the_oldest_supported_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"].values()
    versions = job["strategy"]["matrix"]["python"]
    assert versions == ["3.11", "3.12", "3.13"]
    assert project["requires-python"].startswith(f">={versions[0]}")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_no_workflow_may_write_to_the_repository(path):
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["permissions"] == {"contents": "read"}
