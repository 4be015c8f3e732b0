"""Every notebook once: small ones that pass, fail midway, lose their kernel or take too long; then
the command."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from rich.console import Console

from nbsweep import cli, display, plan, runner
from nbsweep.provenance import commit_of, platform_description, without_private_paths
from nbsweep.registry import RegistryError, load_registry
from nbsweep.runner import carry_out, threads_each
from nbsweep.store import read_sweep

ROOT = Path(__file__).parents[2]
NOTEBOOKS = {
    "01_passes.ipynb": [
        "import os, sys",
        "print(sys.executable == os.environ['THIS_PYTHON'])",
        "print(os.path.realpath(os.getcwd()) == os.environ['THE_FOLDER'])",
        "print(os.environ['HF_HUB_OFFLINE'])",
        "print(os.environ['OMP_NUM_THREADS'])",
    ],
    "02_fails.ipynb": ["x = 1", "raise ValueError('<script>alert(1)</script>')", "print('never')"],
    "03_kernel_dies.ipynb": [
        "y = 1",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "print('never')",
    ],
    "04_too_slow.ipynb": ["import time; time.sleep(120)"],
    "05_passes_last.ipynb": ["print('last', size)"],
}
TIMEOUTS = {"04_too_slow.ipynb": 8}


def write_notebook(path: Path, cells: list[str]):
    code = [nbformat.v4.new_code_cell(source) for source in ["size = 1", *cells]]
    code[0].metadata["tags"] = ["parameters"]
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), *code]), path
    )


def write_suite(folder: Path, notebooks: dict[str, list[str]]) -> Path:
    """The notebooks and their registry, whose path it returns."""
    folder.mkdir()
    registry = 'environment = { HF_HUB_OFFLINE = "1" }\n'
    for file, cells in notebooks.items():
        write_notebook(folder / file, cells)
        registry += (
            f'[[notebook]]\nfile = "{file}"\ntitle = "<b>{file[3:-6]}</b>"\n'
            'tier = "core"\nhardware = "none"\n'
            f"timeout_seconds = {TIMEOUTS.get(file, 60)}\nminutes = 1\n"
        )
    (folder / "registry.toml").write_text(registry)
    return folder / "registry.toml"


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """(runs by number, folder of the sweep, folder of the notebooks) after one run over
    NOTEBOOKS."""
    registry = write_suite(tmp_path_factory.mktemp("suite {0}") / "notebooks", NOTEBOOKS)
    planned = plan.plan_suite(registry=registry)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THIS_PYTHON", sys.executable)
        patch.setenv("THE_FOLDER", str(registry.parent.resolve()))
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        patch.delenv(
            "OMP_NUM_THREADS", raising=False
        )  # which these tests may have been given themselves
        runs, directory = carry_out(
            planned, registry.parents[1] / "runs", 2, Console(file=io.StringIO())
        )
    return {run.spec.notebook[:2]: run for run in runs}, directory, registry.parent


def printed(suite, number):
    runs, directory, _ = suite
    notebook = nbformat.read(directory / runs[number].spec.id / "executed.ipynb", as_version=4)
    return [
        output.text.strip()
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "text" in output
    ]


def test_the_suite_is_one_sweep_over_all_registered_notebooks_with_their_own_parameters():
    planned = plan.plan_suite()
    assert planned.name == "suite"
    assert [spec.notebook for spec in planned.specs] == [
        entry.file for entry in load_registry().notebook
    ]
    assert not any(spec.given for spec in planned.specs)


def test_some_notebooks_are_a_sweep_of_their_own(suite):
    planned = plan.plan_suite(["5", "02"], suite[2] / "registry.toml")
    assert (planned.name, [spec.title for spec in planned.specs]) == (
        "suite-02-05",
        ["<b>fails</b>", "<b>passes_last</b>"],
    )
    with pytest.raises(RegistryError, match="no notebook '77' is registered; .*01, 02, 03, 04, 05"):
        plan.plan_suite(["77"], suite[2] / "registry.toml")


def test_the_kernel_is_this_python_in_the_notebooks_folder_and_offline(suite):
    assert suite[0]["01"].status == "done" and suite[0]["01"].outcome.cells == 6
    assert printed(suite, "01")[:3] == ["True", "True", "1"]


def test_kernels_beside_each_other_share_the_cores(suite, monkeypatch):
    assert printed(suite, "01")[3] == str(threads_each(2))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert [threads_each(workers) for workers in (1, 2, 3, 8, 20)] == [8, 4, 2, 1, 1]


def test_a_failing_notebook_is_named_with_its_cell_and_the_last_line_of_its_traceback(suite):
    outcome = suite[0]["02"].outcome
    assert (outcome.status, outcome.failed_cell) == ("failed", 3)
    assert outcome.error == "ValueError: <script>alert(1)</script>"
    assert "raise ValueError" in outcome.traceback and "\x1b" not in outcome.traceback


def test_a_killed_kernel_is_noticed_long_before_the_timeout(suite):
    outcome = suite[0]["03"].outcome
    assert (outcome.status, outcome.failed_cell) == ("killed", 3)
    assert "kernel died" in outcome.error and outcome.seconds < 50


def test_a_notebook_beyond_its_timeout_is_stopped(suite):
    outcome = suite[0]["04"].outcome
    assert (outcome.status, outcome.failed_cell) == ("timeout", 2)
    assert "8 seconds" in outcome.error
    assert outcome.seconds < 40, "the cell sleeps for 120"


def test_the_notebooks_after_a_failure_still_run(suite):
    assert suite[0]["05"].status == "done"
    assert printed(suite, "05") == ["last 1"]


# --- nbsweep run


@pytest.fixture
def small(tmp_path, monkeypatch):
    """``run(*arguments)`` of the command line on a suite of two notebooks; returns its exit
    code."""
    notebooks = {
        "01_first.ipynb": ["print('one', size)"],
        "02_second.ipynb": ["print('two', size)"],
    }
    write_suite(tmp_path / "notebooks", notebooks)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: cli.main(["run", *arguments])


def test_the_command_runs_all_and_then_only_what_changed_failed_or_is_forced(
    small, tmp_path, capsys
):
    def ran() -> list[str]:
        lines = re.findall(
            r"^ +(?:done|failed)  (\S+)  [\d.]+ s", capsys.readouterr().out, flags=re.MULTILINE
        )
        return sorted(lines)

    assert small() == 0
    assert ran() == ["01_first.ipynb", "02_second.ipynb"]
    assert small() == 0
    assert (
        "2 of 2 runs had ended before; --force (make run: FORCE=1) repeats them"
        in capsys.readouterr().out
    )
    write_notebook(tmp_path / "notebooks" / "02_second.ipynb", ["assert size == 2"])
    assert small() == 1
    assert ran() == ["02_second.ipynb"]
    assert small() == 1
    assert ran() == ["02_second.ipynb"], "what failed is tried again"
    write_notebook(tmp_path / "notebooks" / "02_second.ipynb", ["print('two', size)"])
    assert small() == 0
    assert ran() == [], "done before it was changed"
    assert small("--force", "--workers", "1") == 0
    assert ran() == ["01_first.ipynb", "02_second.ipynb"]
    assert (tmp_path / "runs" / "suite" / "report.html").is_file()
    assert len(read_sweep(tmp_path / "runs" / "suite")[1]) == 2


def test_some_notebooks_as_json_are_one_array_on_stdout(small, tmp_path, capsys):
    assert small("2", "--output", "elsewhere", "--json") == 0
    shown = capsys.readouterr()
    (run,) = json.loads(shown.out)
    assert (run["spec"]["notebook"], run["outcome"]["status"]) == ("02_second.ipynb", "done")
    assert "02_second.ipynb" in shown.err
    assert (tmp_path / "elsewhere" / "suite-02" / "report.html").is_file()


def test_an_interrupted_command_exits_with_130_keeps_what_was_done_and_reports_it(
    small, tmp_path, capsys, monkeypatch
):
    assert small() == 0
    page = tmp_path / "runs" / "suite" / "report.html"
    page.unlink()
    capsys.readouterr()

    def interrupt(progress):
        if progress.running:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(display.Display, "show", lambda self, progress: interrupt(progress))
        assert small("--force", "--workers", "1") == 130
    shown = " ".join(capsys.readouterr().out.split())
    assert "Interrupted. What has ended is kept. Without --force the same command goes on" in shown
    assert page.is_file()
    # The one that had begun has no outcome any more, the other still has its own.
    assert [run.status for run in read_sweep(page.parent)[1]] == ["not run", "done"]
    assert small() == 0
    assert "1 of 2 runs had ended before" in capsys.readouterr().out


def test_an_interrupt_before_anything_is_begun_exits_with_130_too(
    small, tmp_path, monkeypatch, capsys
):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "prepare", interrupt)
    assert small() == 130
    assert "Interrupted." in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "runs" / "suite").iterdir()] == ["lock"]


def test_a_longer_time_limit_counts_for_a_run_that_took_too_long(tmp_path):
    registry = write_suite(
        tmp_path / "notebooks", {"01_slow.ipynb": ["import time; time.sleep(4)"]}
    )
    text = registry.read_text()
    statuses = []
    for seconds in (3, 60):
        registry.write_text(text.replace("timeout_seconds = 60", f"timeout_seconds = {seconds}"))
        planned = plan.plan_suite(registry=registry)
        runs, _ = carry_out(planned, tmp_path / "runs", 1, Console(file=io.StringIO()), retry=True)
        statuses.append(runs[0].status)
    assert statuses == ["timeout", "done"]


def test_no_workers_are_wrong_use_of_a_dry_run_too(small, capsys):
    assert small("--dry-run", "--workers", "0") == 2
    assert "Invalid value for '--workers'" in capsys.readouterr().err


def test_a_dry_run_says_what_would_run_and_how_long_and_runs_nothing(small, tmp_path, capsys):
    assert small("--dry-run") == 0
    shown = capsys.readouterr().out
    assert "01_first.ipynb" in shown and "2 runs, about 1.0 minutes with 2 at a time" in shown
    assert not (tmp_path / "runs").exists()


def test_a_number_that_is_not_registered_is_wrong_use(small, tmp_path, capsys):
    assert small("77") == 2
    assert capsys.readouterr().err.startswith("error: no notebook '77' is registered; ")
    assert not (tmp_path / "runs").exists()


def test_a_report_names_neither_the_home_folder_nor_the_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    text = f"File {tmp_path}/notebooks/a.py and /home/somebody/lib/b.py"
    assert without_private_paths(text, [tmp_path]) == "File notebooks/a.py and ~/lib/b.py"
    assert os.uname().nodename not in platform_description().split()


def test_the_commit_is_the_one_of_the_folders_own_repository_and_says_if_files_differ(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        done = subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    (package := tmp_path / "package").mkdir()
    (package / "a.py").write_text("a = 1\n")
    assert commit_of(package) == ""
    git("init", "-q")
    assert commit_of(package) == "", "not part of the repository around it"
    git("add", "package/a.py")
    git("commit", "-qm", "first")
    assert commit_of(package) == git("rev-parse", "--short=12", "HEAD")
    (package / "a.py").write_text("a = 2\n")
    assert commit_of(package) == git("rev-parse", "--short=12", "HEAD") + "-dirty"
    (installed := tmp_path / "site-packages" / "glm4v_nb").mkdir(parents=True)
    (installed / "a.py").write_text("a = 1\n")
    assert commit_of(installed) == ""
