"""Running small notebooks: one that passes, one that fails midway, one whose kernel dies, one too slow."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from glm4v_nb.experiment import run
from glm4v_nb.experiment.report import write_report
from glm4v_nb.experiment.summary import (
    NotebookResult,
    RunSummary,
    platform_description,
    without_private_paths,
)

HERE = Path.cwd()
NOTEBOOKS = {
    "01_passes.ipynb": [
        "import os, sys",
        "print(sys.executable)",
        "print(os.path.realpath(os.getcwd()))",
        "print(os.environ['HF_HUB_OFFLINE'])",
    ],
    "02_fails.ipynb": ["x = 1", "raise ValueError('<script>alert(1)</script>')", "print('never')"],
    "03_kernel_dies.ipynb": [
        "y = 1",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "print('never')",
    ],
    "04_too_slow.ipynb": ["import time; time.sleep(120)"],
    "05_passes_last.ipynb": ["print('last')"],
}
TIMEOUTS = {"04_too_slow.ipynb": 8}


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """(registry, summary, folder of the run) after one run over NOTEBOOKS."""
    notebooks = tmp_path_factory.mktemp("suite {0}") / "notebooks"
    notebooks.mkdir()
    registry = ""
    for file, cells in NOTEBOOKS.items():
        code = [nbformat.v4.new_code_cell(cell) for cell in cells]
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), *code])
        nbformat.write(notebook, notebooks / file)
        registry += (
            f'[[notebook]]\nfile = "{file}"\ntitle = "<b>{file[3:-6]}</b>"\n'
            'tier = "core"\nhardware = "none"\n'
            f"timeout_seconds = {TIMEOUTS.get(file, 60)}\nminutes = 1\n"
        )
    path = notebooks / "registry.toml"
    path.write_text(registry)
    summary, directory = run.run_suite(output=notebooks.parent / "runs", registry=path)
    return path, summary, directory


def result_of(suite, number):
    return next(result for result in suite[1].notebooks if result.file.startswith(number))


def printed(suite, file):
    notebook = nbformat.read(suite[2] / file, as_version=4)
    return [
        output.text.strip()
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "text" in output
    ]


def test_a_passing_notebook_is_done_and_has_its_outputs(suite):
    result = result_of(suite, "01")
    assert (result.status, result.cells, result.error) == ("done", 4, None)
    assert len(printed(suite, result.executed)) == 3


def test_the_kernel_is_this_python_in_the_notebooks_folder_and_offline(suite):
    assert printed(suite, "01_passes.ipynb") == [sys.executable, str(suite[0].parent.resolve()), "1"]


def test_the_process_that_runs_notebooks_stays_where_it_is(suite):
    assert Path.cwd() == HERE, "two notebooks at a time ran before this"


def test_a_failing_notebook_is_named_with_its_cell_and_the_last_line_of_its_traceback(suite):
    result = result_of(suite, "02")
    assert (result.status, result.failed_cell) == ("failed", 2)
    assert result.error == "ValueError: <script>alert(1)</script>"
    assert "raise ValueError" in result.traceback and "\x1b" not in result.traceback


def test_a_killed_kernel_is_noticed_and_its_notebook_failed(suite):
    result = result_of(suite, "03")
    assert (result.status, result.failed_cell) == ("failed", 2)
    assert "kernel died" in result.error
    assert result.seconds < 50, "noticed long before the 60 second timeout"


def test_a_notebook_beyond_its_timeout_is_stopped_and_failed(suite):
    result = result_of(suite, "04")
    assert (result.status, result.failed_cell) == ("failed", 1)
    assert "8 seconds" in result.error
    assert result.seconds < 40, "the cell sleeps for 120"


def test_the_notebooks_after_a_failure_still_run(suite):
    assert result_of(suite, "05").status == "done"
    assert suite[1].exit_code == 1


def test_the_summary_file_holds_what_was_returned(suite):
    written = json.loads((suite[2] / "summary.json").read_text())
    assert RunSummary.model_validate(written) == suite[1]
    assert [notebook["file"] for notebook in written["notebooks"]] == list(NOTEBOOKS)
    assert set(written["versions"]) == {"python", "torch", "transformers", "accelerate", "glm4v_nb"}
    assert not list(suite[2].glob("*.partial"))


def test_the_report_links_every_executed_and_rendered_notebook_that_exists(suite):
    page = (suite[2] / "index.html").read_text()
    for result in suite[1].notebooks:
        for name in (result.executed, result.rendered):
            assert f'href="{name}"' in page and (suite[2] / name).stat().st_size > 0


def test_the_report_escapes_what_notebooks_write(suite):
    page = (suite[2] / "index.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert "<b>passes</b>" not in page and "&lt;b&gt;passes&lt;/b&gt;" in page


def test_the_report_needs_nothing_from_elsewhere(suite):
    page = (suite[2] / "index.html").read_text()
    assert "http://" not in page and "https://" not in page and "src=" not in page


def test_the_command_runs_one_chosen_notebook_and_prints_the_report_to_open(suite, capsys):
    code = run.main(
        ["--notebooks", "5", "--registry", str(suite[0]), "--output", str(suite[0].parent.parent / "one")]
    )
    shown = capsys.readouterr().out
    assert code == 0
    assert "1 of 1 notebooks done" in shown and "index.html" in shown.replace("\n", "")


def test_an_unknown_number_is_wrong_use_and_names_those_that_exist(suite, capsys, tmp_path):
    assert run.main(["--notebooks", "77", "--registry", str(suite[0]), "--output", str(tmp_path)]) == 2
    assert "77" in (error := capsys.readouterr().err) and "01, 02, 03, 04, 05" in error
    assert not list(tmp_path.iterdir())


def test_an_interrupt_keeps_what_was_done_and_says_what_was_not_run(suite, tmp_path, monkeypatch):
    def execute(entry, *_, **__):
        if entry.number == "02":
            raise KeyboardInterrupt
        return NotebookResult(file=entry.file, title=entry.title, status="done")

    monkeypatch.setattr(run, "execute_notebook", execute)
    assert run.main(["--registry", str(suite[0]), "--output", str(tmp_path), "--workers", "1"]) == 130
    (directory,) = tmp_path.iterdir()
    written = RunSummary.model_validate_json((directory / "summary.json").read_text())
    assert [result.status for result in written.notebooks] == ["done"] + ["not run"] * 4
    assert (directory / "index.html").exists()


@pytest.mark.parametrize("seconds", [0.5, 4.0])
def test_ctrl_c_ends_the_kernels_that_run_or_start_and_leaves_a_report(suite, tmp_path, seconds):
    command = [
        sys.executable,
        "-m",
        "glm4v_nb.experiment.run",
        "--registry",
        str(suite[0]),
        "--output",
        str(tmp_path),
    ]
    process = subprocess.Popen(
        [*command, "--notebooks", "4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*")) and time.monotonic() < deadline:  # until it has begun
        time.sleep(0.05)
    time.sleep(seconds)
    begin = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == 130
    assert time.monotonic() - begin < 25
    (written,) = json.loads(next(tmp_path.glob("*/summary.json")).read_text())["notebooks"]
    assert (written["status"], written["error"]) == ("not run", "interrupted")


def test_a_traceback_is_shown_folded(tmp_path):
    summary = RunSummary(started="now", versions={}, platform="none")
    summary.notebooks = [
        NotebookResult(file="a", title="a", status="failed", error="E", traceback="line <1>")
    ]
    page = write_report(summary, tmp_path).read_text()
    assert "<details>" in page and "line &lt;1&gt;" in page


def test_a_report_names_neither_the_home_folder_nor_the_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    text = f"File {tmp_path}/notebooks/a.py and /home/somebody/lib/b.py"
    assert without_private_paths(text, tmp_path) == "File notebooks/a.py and ~/lib/b.py"
    import platform

    assert platform.node() not in platform_description().split()
