"""pyproject.toml, requirements.lock and environment.yml agree; the set-up script decides right."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "setup_environment.py"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

specification = importlib.util.spec_from_file_location("setup_environment", SCRIPT)
setup_environment = importlib.util.module_from_spec(specification)
specification.loader.exec_module(setup_environment)


def locked():
    """{canonical name: Requirement} of requirements.lock."""
    lines = (
        line.split("#")[0].strip() for line in (ROOT / "requirements.lock").read_text().splitlines()
    )
    requirements = [Requirement(line) for line in lines if line]
    assert len(requirements) == len(
        {canonicalize_name(requirement.name) for requirement in requirements}
    )
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def pinned_version(requirement):
    (specifier,) = requirement.specifier
    assert specifier.operator == "==" and "*" not in specifier.version, requirement
    return specifier.version


DECLARED = [
    *PYPROJECT["project"]["dependencies"],
    *PYPROJECT["project"]["optional-dependencies"]["dev"],
    *PYPROJECT["build-system"]["requires"],
]


@pytest.mark.parametrize("declared", DECLARED)
def test_a_declared_dependency_is_locked_inside_its_range(declared):
    requirement = Requirement(declared)
    version = pinned_version(locked()[canonicalize_name(requirement.name)])
    assert requirement.specifier.contains(version), f"{declared} is locked at {version}"


def test_every_line_of_the_lock_is_one_exact_public_version():
    for requirement in locked().values():
        assert "+" not in pinned_version(requirement), requirement


def test_the_lock_pins_the_versions_the_suite_is_written_for_and_no_cuda_library():
    lock = locked()
    versions = {
        name: pinned_version(lock[name]) for name in ("torch", "transformers", "accelerate")
    }
    assert versions == {"torch": "2.13.0", "transformers": "5.23.0", "accelerate": "1.15.0"}
    assert [name for name in lock if name.startswith("nvidia-")] == ["nvidia-ml-py"]
    assert "torchvision" not in lock
    # It reads a grammar for seconds in every process that imports nbformat.
    assert "rfc3987-syntax" not in lock


@pytest.mark.skipif(
    Path(sys.prefix).resolve() != ROOT / ".venv",
    reason="not in the .venv that make builds: other versions may be meant",
)
def test_what_is_installed_here_is_what_the_lock_says():
    for name, requirement in locked().items():
        if requirement.marker is None or requirement.marker.evaluate():
            installed = importlib.metadata.version(name).split("+")[0]
            assert installed == pinned_version(requirement), (
                f"{name} {installed} is installed; run make setup"
            )


def test_conda_installs_the_same_lock_and_the_project_on_the_same_pythons():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [part["pip"] for part in environment["dependencies"] if isinstance(part, dict)]
    assert pip == ["-r requirements.lock", "-e ."]
    (python,) = [part for part in environment["dependencies"] if str(part).startswith("python")]
    conda = SpecifierSet(python.removeprefix("python"))
    declared = SpecifierSet(PYPROJECT["project"]["requires-python"])
    for minor, supported in ((10, False), (11, True), (12, True), (13, True)):
        assert conda.contains(f"3.{minor}.0") == declared.contains(f"3.{minor}.0") == supported


def test_the_setup_script_asks_for_the_python_that_pyproject_requires():
    assert PYPROJECT["project"]["requires-python"] == ">={}.{}".format(*setup_environment.MINIMUM)


def test_the_setup_script_is_short_and_parses_under_old_pythons():
    text = SCRIPT.read_text()
    assert len(text.splitlines()) < 120
    ast.parse(text, feature_version=(3, 6))
    assert not re.search(r"\bf[\"']", text), "f-strings do not parse under Python 2.7"


def test_an_old_python_is_refused_in_one_line_that_says_what_to_do():
    with pytest.raises(SystemExit) as refused:
        setup_environment.check_version((3, 9, 18), "python3")
    message = refused.value.code
    assert "3.9" in message and "3.11 or newer" in message and "make run PYTHON=" in message
    assert message.startswith("error: ") and "\n" not in message


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 12, 1), (4, 0, 0)])
def test_a_new_enough_python_is_accepted(version):
    setup_environment.check_version(version, "python3")


@pytest.fixture
def project(tmp_path):
    """A folder with the two files the environment depends on and a finished environment of Python
    3.12."""
    (tmp_path / "requirements.lock").write_text("a==1\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    environment = tmp_path / ".venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").touch()
    stamp = setup_environment.fingerprint(str(tmp_path), "3.12")
    (environment / setup_environment.STAMP).write_text(json.dumps(stamp))
    return tmp_path


def work_for(project, chosen_python=None):
    wanted = setup_environment.fingerprint(str(project), chosen_python)
    return setup_environment.needed_work(str(project / ".venv"), wanted)


def test_a_finished_environment_is_reused_also_when_files_are_only_touched(project):
    os.utime(project / "requirements.lock", (1, 1))
    assert work_for(project) == "nothing"


def test_another_lock_builds_the_environment_again(project):
    (project / "requirements.lock").write_text("a==2\n")
    assert work_for(project) == "all"


def test_another_pyproject_installs_the_project_again(project):
    (project / "pyproject.toml").write_text("[project]\nversion = '2'\n")
    assert work_for(project) == "project"


def test_an_environment_without_a_whole_stamp_is_built_again(project):
    stamp = project / ".venv" / setup_environment.STAMP
    stamp.write_text(stamp.read_text()[:20])
    assert work_for(project) == "all"
    stamp.unlink()
    assert work_for(project) == "all"


def test_an_environment_whose_python_is_gone_is_built_again(project):
    (project / ".venv" / "bin" / "python").unlink()
    assert work_for(project) == "all"


def test_an_environment_moved_to_another_place_is_built_again(project):
    shutil.copytree(project, project / "copy")
    assert work_for(project / "copy") == "all"


def test_a_python_chosen_by_the_user_replaces_another_and_keeps_its_own(project):
    assert work_for(project, chosen_python="3.13") == "all"
    assert work_for(project, chosen_python="3.12") == "nothing"


def test_a_folder_named_venv_that_is_none_is_left_alone(project):
    with pytest.raises(SystemExit, match="left alone"):
        setup_environment.create(str(project), str(project / ".venv"))
    assert (project / ".venv" / "bin" / "python").exists()


def test_an_environment_that_is_built_again_loses_its_stamp_before_anything_else(
    project, monkeypatch
):
    """However the building ends, what is left must not pass for finished."""
    (project / ".venv" / "pyvenv.cfg").touch()
    monkeypatch.setattr(setup_environment.subprocess, "call", lambda command: 1)
    with pytest.raises(SystemExit, match="makes no environments"):
        setup_environment.create(str(project), str(project / ".venv"))
    assert setup_environment.read_stamp(str(project / ".venv")) == {}


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("Collecting torch==2.13.0\nERROR: No matching distribution found for torch==2.13.0\n",
         ["No matching distribution found for torch==2.13.0", "network"]),
        ("WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError'\n"
         "ERROR: No matching distribution found for rich==1\n",
         ["rich==1", "network or the package index"]),
        ("Collecting torch==2.13.0\nERROR: Could not install: OSError: [Errno 28] No space left\n",
         ["Errno 28", "disk space"]),
        ("error: subprocess-exited-with-error\nERROR: Failed building wheel for pyzmq\n",
         ["pyzmq"]),
        ("", ["everything", "Log:"]),
    ],
)  # fmt: skip
def test_a_failed_install_says_why_and_what_to_do_in_one_line(output, expected):
    message = setup_environment.explain_failure(output)
    assert all(part in message for part in [*expected, "run make run again", ".venv/setup.log"])
    assert "\n" not in message


def test_a_failed_install_exits_1_and_leaves_no_environment_that_passes_for_finished(tmp_path):
    (tmp_path / "tools").mkdir()
    shutil.copy(SCRIPT, tmp_path / "tools")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "requirements.lock").write_text("./no-such-wheel-1.0-py3-none-any.whl\n")
    for _ in range(2):
        made = subprocess.run(
            [sys.executable, "-I", "tools/setup_environment.py"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert made.returncode == 1
        (line,) = made.stderr.splitlines()
        assert line.startswith("error: pip could not install") and "make run again" in line
        assert (tmp_path / ".venv" / "setup.log").read_text()
        assert setup_environment.read_stamp(str(tmp_path / ".venv")) == {}


def make(*arguments, **variables):
    outside = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    } | variables
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=outside, capture_output=True, text=True
    )


def test_make_alone_explains_every_target_and_variable():
    shown = make().stdout
    for target in ("run", "test", "lab", "lint", "setup", "clean"):
        assert f"make {target} " in shown
    for variable in ("PYTHON=", "NOTEBOOKS=", "OUTPUT=", "TESTS=", "WORKERS="):
        assert variable in shown


def test_make_refuses_a_mistyped_variable():
    made = make("help", "NOTEBOKS=01")
    assert made.returncode == 2 and "unknown variable NOTEBOKS" in made.stderr


def test_make_says_in_one_line_that_the_named_python_does_not_exist():
    made = make("setup", "PYTHON=no-such-python")
    assert made.returncode == 2 and made.stderr.startswith("error: no-such-python is not on PATH")


def test_make_passes_over_a_python3_that_is_too_old_or_only_a_shim(tmp_path):
    for name, answer in (("python3", 1), ("python3.13", 127), ("python3.12", 0)):
        python = tmp_path / name
        # Told to build, it prints its name; asked whether it is new enough, it ends as it should.
        python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit {answer}\necho I am {name}\n')
        python.chmod(0o755)
    made = make("setup", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert made.returncode == 0 and made.stdout.startswith("I am python3.12")
    named = make("setup", "PYTHON=python3", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert named.stdout.startswith("I am python3\n"), "a Python that was named is never replaced"
