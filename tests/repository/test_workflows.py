"""The workflows for GitHub and the hooks of pre-commit call what exists, on the Pythons the package
supports."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from nbsweep.plan import plan_notebook

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
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())[
        "jobs"
    ].values()
    versions = job["strategy"]["matrix"]["python"]
    assert versions == ["3.11", "3.12", "3.13"]
    assert project["requires-python"].startswith(f">={versions[0]}")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_no_workflow_may_write_to_the_repository(path):
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["permissions"] == {"contents": "read"}


def test_each_push_is_linted_tested_and_validated_and_no_notebook_is_run_twice():
    found = [shlex.split(line) for line in commands(ROOT / ".github" / "workflows" / "ci.yml")]
    made = [words[1:-1] for words in found if words[0] == "make"]
    assert made == [["lint"], ["validate"], ["test", "TESTS=tests"]], (
        "the notebooks are what validate runs"
    )


def test_the_weekly_run_takes_the_newest_libraries_and_every_test():
    found = commands(ROOT / ".github" / "workflows" / "weekly.yml")
    assert not any("requirements.lock" in line or line.startswith("make") for line in found)
    everything, figures = [line for line in found if "pytest" in line]
    assert everything == "python -m pytest -n 2 --dist loadfile"
    assert found.index("python tools/accuracy.py --simulate") < found.index(figures)
    assert all((ROOT / name).is_file() for name in figures.split()[3:])
    trigger = yaml.safe_load((ROOT / ".github" / "workflows" / "weekly.yml").read_text())[
        True
    ]  # "on" in YAML 1.1
    assert [len(each["cron"].split()) for each in trigger["schedule"]] == [5]


def test_the_files_that_are_tested_first_exist():
    (listed,) = re.findall(r"LONGEST = \((.*?)\)", (ROOT / "conftest.py").read_text(), re.DOTALL)
    files = re.findall(r'"(.+)"', listed)
    assert files and all((ROOT / name).is_file() for name in files)


def test_the_run_on_gpus_starts_by_hand_only():
    trigger = yaml.safe_load((ROOT / ".github" / "workflows" / "gpu.yml").read_text())[True]
    assert list(trigger) == ["workflow_dispatch"]


@pytest.mark.parametrize(
    "path", [*WORKFLOWS, ROOT / ".ci" / "run", ROOT / "Makefile"], ids=lambda path: path.stem
)
def test_notebooks_are_run_with_other_values_of_their_parameters_only(path):
    """What a workflow sets with -p is a parameter of that notebook, of its type, and reaches its
    code."""
    text = path.read_text(encoding="utf-8")
    for line in re.findall(r"glm4v-nb run .*", text):
        (number, *pairs) = shlex.split(line)[2:]
        assert pairs[::3] == ["-p"] * (len(pairs) // 3), line
        assert plan_notebook(number, dict(zip(pairs[1::3], pairs[2::3], strict=True))).specs
    # There is no other way in: variables that workflows set are read by installers and libraries,
    # not by this package.
    for name in re.findall(r"^ +([A-Z][A-Z_]+):", text, flags=re.MULTILINE):
        known = ("PIP_EXTRA_INDEX_URL", "HF_HUB_OFFLINE", "CHECKPOINT", "EVERY_MEASUREMENT")
        assert name in known, name


HOOKS = [
    hook
    for repository in yaml.safe_load(
        (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    )["repos"]
    for hook in repository["hooks"]
]


def test_the_hooks_are_ruff_and_nb_clean_in_the_versions_of_the_lock():
    locked = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    assert [hook["id"] for hook in HOOKS] == ["ruff-check", "ruff-format", "nb-clean"]
    for hook in HOOKS:
        (requirement,) = hook["additional_dependencies"]
        assert requirement in locked


def test_the_hooks_of_ruff_do_what_make_lint_checks():
    for hook in HOOKS[:2]:
        assert hook["entry"].removesuffix(" --force-exclude") in MAKEFILE, (
            "the same command, and excluded files stay so"
        )


def test_the_hook_of_nb_clean_has_nothing_to_change_in_the_notebooks(tmp_path):
    copies = Path(shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks"))
    program, *options = shlex.split(HOOKS[2]["entry"])
    files = sorted(copies.glob("*.ipynb"))
    subprocess.run([Path(sys.executable).with_name(program), *options, *files], check=True)
    for path in files:
        assert path.read_bytes() == (ROOT / "notebooks" / path.name).read_bytes()
