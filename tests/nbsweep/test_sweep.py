"""From a sweep file or a command line to planned runs, their display and their exit code."""

import io
import json
import re
from pathlib import Path

import nbformat
import pytest
from rich.console import Console

import glm4v_nb.cli
from nbsweep import sweep
from nbsweep.display import Display, ending_in_words, parameters_in_words, print_runs
from nbsweep.outcome import FinishedRun, Outcome, OutOfMemoryCause, Record, read_sweep
from nbsweep.pool import Progress
from nbsweep.worker import cause_of

SWEEPS = sorted((Path(__file__).parents[2] / "sweeps").glob("*.yaml"))
MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 22.03 GiB of"
    " which 1.00 GiB is free. Including non-PyTorch memory, this process has 21.03 GiB memory in"
    " use. Of the allocated memory 20.00 GiB is allocated by PyTorch, and 0 bytes is reserved by"
    " PyTorch but unallocated."
)


@pytest.fixture
def registry(tmp_path):
    """A registry of one small notebook that doubles a number."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    cells = [nbformat.v4.new_code_cell("number = 1\nname = 'a'\nsizes = [1, 2]")]
    cells[0].metadata["tags"] = ["parameters"]
    cells.append(nbformat.v4.new_code_cell("print(number, name, sizes)\nassert number < 5"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "01_small.ipynb")
    path = folder / "registry.toml"
    path.write_text(
        '[[notebook]]\nfile = "01_small.ipynb"\ntitle = "Small"\ntier = "core"\nhardware = "any"\n'
        "timeout_seconds = 60\nminutes = 2\n"
    )
    return path


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_sweeps_of_the_suite_are_right_and_of_a_size_for_a_laptop(path):
    plan = sweep.plan_file(path)
    assert plan.name == path.stem
    assert 6 <= len(plan.specs) <= 24
    assert len({spec.id for spec in plan.specs}) == len(plan.specs)


def test_a_notebook_on_a_command_line_gets_typed_parameters(registry):
    plan = sweep.plan_notebook("1", {"number": "3", "name": "3", "sizes": "[4, 5]"}, registry)
    (spec,) = plan.specs
    assert spec.parameters == {"number": 3, "name": "3", "sizes": [4, 5]}
    assert spec.given == ["name", "number", "sizes"]
    assert (plan.name, plan.minutes, spec.timeout_seconds) == ("01_small", 2, 60)


@pytest.mark.parametrize(
    ("texts", "error"),
    [
        ({"nmber": "3"}, "did you mean number"),
        ({"number": "three"}, "-p number: 'three' cannot be read as an int"),
    ],
)
def test_a_wrong_parameter_on_a_command_line_is_refused(registry, texts, error):
    with pytest.raises(ValueError, match=error):
        sweep.plan_notebook("01", texts, registry)


def test_a_sweep_is_carried_out_and_a_second_time_nothing_is_left_to_do(registry, tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text('runs: [{notebook: "01", grid: {number: [1, 9]}}]')
    plan = sweep.plan_file(file, registry)
    shown = io.StringIO()
    runs, directory = sweep.carry_out(plan, tmp_path / "runs", 2, Console(file=shown, width=200))
    assert [run.outcome.status for run in runs] == ["done", "failed"]
    assert sweep.exit_code(runs) == 1
    assert re.search(r"done  01_small.ipynb  number=1  [\d.]+ s\n", shown.getvalue())
    assert "failed  01_small.ipynb  number=9" in shown.getvalue()
    again = io.StringIO()
    sweep.carry_out(plan, tmp_path / "runs", 2, Console(file=again, width=200))
    assert (
        again.getvalue()
        == "2 of 2 runs had ended before; --force (make run: FORCE=1) repeats them\n"
    )
    assert read_sweep(directory)[1] == runs


def test_no_workers_are_refused(registry, tmp_path):
    plan = sweep.plan_notebook("1", {}, registry)
    with pytest.raises(ValueError, match="workers is 0; expected at least 1"):
        sweep.carry_out(plan, tmp_path, 0, Console())


def finished(status, registry, **about):
    (spec,) = sweep.plan_notebook("1", {"number": "2"}, registry).specs
    outcome = (
        None if status == "not run" else Outcome(status=status, started="now", seconds=1.0, **about)
    )
    return FinishedRun(
        spec=spec,
        outcome=outcome,
        records=[Record(name="size", value=3, unit="", label="simulated")],
    )


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (["done", "done"], 0),
        (["done", "oom"], 3),
        (["oom", "failed"], 1),
        (["done", "killed"], 1),
        (["done", "timeout"], 1),
        (["done", "not run"], 1),
    ],
)
def test_the_exit_code_says_the_worst_that_happened(registry, statuses, code):
    assert sweep.exit_code([finished(status, registry) for status in statuses]) == code


def test_the_display_prints_what_ends_and_estimates_what_is_left(registry):
    run = finished(
        "oom",
        registry,
        oom=OutOfMemoryCause(device=1, phase="prefill", short_bytes=1),
        error="OutOf: x",
    )
    assert parameters_in_words(run.spec) == "number=2"
    assert ending_in_words(run) == "oom: card 1, prefill"
    shown = io.StringIO()
    console = Console(file=shown, width=120)
    with Display([run.spec], 1, console) as display:
        progress = Progress(3, {"earlier": finished("done", registry).outcome})
        display.show(progress)
        assert display.remaining_seconds(progress) is None
        progress.outcomes[run.spec.id] = run.outcome
        display.show(progress)
        display.show(progress)
        assert display.remaining_seconds(progress) > 0
    assert shown.getvalue().splitlines() == [
        "1 of 3 runs had ended before",
        "    oom  01_small.ipynb  number=2  1.0 s  oom: card 1, prefill",
    ]
    print_runs([run, finished("not run", registry)], console)
    assert "1 oom, 1 not run" in shown.getvalue()
    assert "size 3" in shown.getvalue()


def test_the_phase_of_an_out_of_memory_error_is_the_note_of_the_innermost_stage_and_no_line_of_code():
    code = "error.add_note(f'in the stage \"{name}\"')\nraise error\n"
    notes = '\nin the stage "prefill"\nin the stage "all"'
    cause = cause_of(f"OutOfMemoryError: {MESSAGE}", f"{code}OutOfMemoryError: {MESSAGE}{notes}")
    assert cause == OutOfMemoryCause(device=1, phase="prefill", short_bytes=2**30)
    assert cause_of("OutOfMemoryError: full", code) == OutOfMemoryCause(
        device=None, phase=None, short_bytes=None
    )


def test_a_prediction_is_made_where_there_is_a_card_and_one_for_equal_settings():
    asked = []
    specs = sweep.plan_file(SWEEPS[0]).specs[:2] if SWEEPS[0].stem == "fit" else []
    found = sweep.predict([*specs, *specs], lambda: asked.append(1))
    assert len(asked) == len(specs) == 2
    assert set(found.values()) <= {
        "fits",
        "does not fit: card 0, load",
        "does not fit: card 0, prefill",
    }
    assert sweep.predict(sweep.plan_notebook("16", {}).specs) == {}


# --- the command line


def test_the_command_runs_a_dry_run_without_running_anything(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "predict", lambda specs: {specs[0].id: "does not fit: card 0, load"})
    code = glm4v_nb.cli.main(
        ["sweep", str(SWEEPS[0]), "--dry-run", "--json", "--output", str(tmp_path)]
    )
    plan = json.loads(capsys.readouterr().out)
    assert code == 0
    assert plan["name"] == "fit"
    assert plan["runs"][0]["predicted"] == "does not fit: card 0, load"
    assert plan["runs"][1]["predicted"] is None
    assert list(tmp_path.iterdir()) == []
    assert glm4v_nb.cli.main(["sweep", str(SWEEPS[0]), "--dry-run"]) == 0
    assert "24 runs, about" in capsys.readouterr().out


def test_the_command_runs_one_notebook_with_parameters_and_reports(
    capsys, registry, tmp_path, monkeypatch
):
    plan = sweep.plan_notebook
    monkeypatch.setattr(sweep, "plan_notebook", lambda number, texts: plan(number, texts, registry))
    arguments = [
        "run",
        "01",
        "-p",
        "number",
        "4",
        "-p",
        "name",
        "b",
        "--output",
        str(tmp_path / "runs"),
    ]
    assert glm4v_nb.cli.main(arguments) == 0
    assert "name=b number=4" in capsys.readouterr().out
    page = tmp_path / "runs" / "01_small" / "report.html"
    assert page.is_file()
    assert glm4v_nb.cli.main(["report", str(page.parent)]) == 0
    assert str(page) in capsys.readouterr().out
    assert glm4v_nb.cli.main(["report", str(page.parent), "--compare", str(page.parent)]) == 0
    assert (page.parent / "changes-from-01_small.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["run", "01", "-p", "card"], "-p needs a name and a value"),
        (["run", "-p", "card", "L4"], "-p is for one notebook"),
        (["run", "01", "02", "-p", "card", "L4"], "-p is for one notebook"),
        (["sweep", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["report", "nowhere"], "nowhere holds no sweep.json"),
    ],
)
def test_wrong_use_of_the_commands_says_what_is_expected(capsys, arguments, error):
    try:
        code = glm4v_nb.cli.main(arguments)
    except SystemExit as leaving:
        code = leaving.code
    assert code in (1, 2)
    assert error in capsys.readouterr().err
