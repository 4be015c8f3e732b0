"""From a sweep file or a command line to planned runs, their display and their exit code."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from rich.console import Console

from nbsweep import cli, display, errors, plan
from nbsweep.display import Display, ending_in_words, parameters_in_words, print_runs
from nbsweep.errors import cause_of
from nbsweep.registry import RegistryError
from nbsweep.runner import Progress, carry_out, exit_code
from nbsweep.store import FinishedRun, Outcome, OutOfMemoryCause, Record, read_sweep

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "sweeps").glob("*.toml"))
TARGETS = ROOT / "sweeps" / "targets"
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
    planned = plan.plan_file(path)
    assert planned.name == path.stem
    assert 6 <= len(planned.specs) <= 24
    assert len({spec.id for spec in planned.specs}) == len(planned.specs)
    assert planned.minutes <= 5


def test_a_notebook_on_a_command_line_gets_typed_parameters(registry):
    planned = plan.plan_notebook("1", {"number": "3", "name": "3", "sizes": "[4, 5]"}, registry)
    (spec,) = planned.specs
    assert spec.parameters == {"number": 3, "name": "3", "sizes": [4, 5]}
    assert spec.given == ["name", "number", "sizes"]
    assert (planned.name, planned.minutes, spec.timeout_seconds) == ("01_small", 2, 60)


@pytest.mark.parametrize(
    ("texts", "error"),
    [
        ({"nmber": "3"}, "did you mean number"),
        ({"number": "three"}, "-p number: 'three' cannot be read as an int"),
        ([("number", "3"), ("number", "3")], "-p number is given twice; give it once"),
        ({"name": "a\udcff"}, "-p name: 'a.udcff' cannot be read as a str; write whole characters"),
        ({"name": "a\ud83d"}, "-p name: .* write whole characters"),
    ],
)
def test_a_wrong_parameter_on_a_command_line_is_refused(registry, texts, error):
    with pytest.raises(ValueError, match=error):
        plan.plan_notebook("01", texts, registry)


def test_a_file_whose_name_has_half_of_a_character_is_refused_by_it(registry, tmp_path):
    notebook = tmp_path / "m\udcff.ipynb"
    notebook.write_bytes((registry.parent / "01_small.ipynb").read_bytes())
    with pytest.raises(RegistryError, match="'m.udcff.ipynb' has half of a character in its name"):
        plan.plan_notebook(str(notebook), {}, registry)
    file = tmp_path / "n\udcff.toml"
    file.write_text('[[runs]]\nnotebook = "01"')
    with pytest.raises(ValueError, match="name: 'n.udcff' .*expected whole characters"):
        plan.plan_file(file, registry)


def test_a_sweep_is_carried_out_and_a_second_time_nothing_is_left_to_do(registry, tmp_path):
    file = tmp_path / "small.toml"
    file.write_text('[[runs]]\nnotebook = "01"\ngrid.number = [1, 9]')
    planned = plan.plan_file(file, registry)
    shown = io.StringIO()
    runs, directory = carry_out(planned, tmp_path / "runs", 2, Console(file=shown, width=200))
    assert [run.outcome.status for run in runs] == ["done", "failed"]
    assert exit_code(runs) == 1
    assert re.search(r"done  01_small.ipynb  number=1  [\d.]+ s\n", shown.getvalue())
    assert "failed  01_small.ipynb  number=9" in shown.getvalue()
    again = io.StringIO()
    carry_out(planned, tmp_path / "runs", 2, Console(file=again, width=200))
    assert (
        again.getvalue()
        == "2 of 2 runs had ended before; --force (make run: FORCE=1) repeats them\n"
    )
    assert read_sweep(directory)[1] == runs


def test_no_workers_are_refused(registry, tmp_path):
    planned = plan.plan_notebook("1", {}, registry)
    with pytest.raises(ValueError, match="workers is 0; expected at least 1"):
        carry_out(planned, tmp_path, 0, Console())


def finished(status, registry, **about):
    (spec,) = plan.plan_notebook("1", {"number": "2"}, registry).specs
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
    assert exit_code([finished(status, registry) for status in statuses]) == code


def test_the_display_prints_what_ends_and_what_holds_the_sweep_up(registry):
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
    with Display([run.spec], console) as display:
        progress = Progress(3, {"earlier": finished("done", registry).outcome})
        display.show(progress)
        progress.outcomes[run.spec.id] = run.outcome
        display.show(progress)
        display.show(progress)
        progress.note("waiting for a worker")
        progress.note("waiting for a worker")
        display.show(progress)
    assert shown.getvalue().splitlines() == [
        "1 of 3 runs had ended before",
        "    oom  01_small.ipynb  number=2  1.0 s  oom: card 1, prefill",
        "waiting for a worker",
    ]
    print_runs([run, finished("not run", registry)], console)
    assert "1 oom, 1 not run" in shown.getvalue()
    assert "size 3" in shown.getvalue()


def test_a_terminal_shows_a_bar_for_every_run_and_at_which_cell_it_is(registry, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    run = finished("done", registry)
    shown = io.StringIO()
    console = Console(file=shown, width=120, force_terminal=True)
    with Display([run.spec], console) as display:
        progress = Progress(2, running={run.spec.id: (2, 5)})
        display.show(progress)
        display._bars.refresh()
        assert "01_small.ipynb number=2" in shown.getvalue() and "2/5" in shown.getvalue()
        progress.running.clear()
        progress.outcomes[run.spec.id] = run.outcome
        display.show(progress)
        display._bars.refresh()
    assert "all runs  1 done" in shown.getvalue()


def test_the_phase_of_an_out_of_memory_error_is_the_note_of_the_innermost_stage_and_no_code():
    code = "error.add_note(f'in the stage \"{name}\"')\nraise error\n"
    notes = '\nin the stage "prefill"\nin the stage "all"'
    cause = cause_of(f"OutOfMemoryError: {MESSAGE}", f"{code}OutOfMemoryError: {MESSAGE}{notes}")
    assert (cause.device, cause.phase, cause.short_bytes) == (1, "prefill", 2**30)
    assert cause.needs_bytes == round(23.03 * 2**30), "what it held of the card, and the request"
    assert cause_of("OutOfMemoryError: full", code) == OutOfMemoryCause()


def test_who_can_read_an_error_and_who_can_predict_a_run_are_asked_and_nobody_else(monkeypatch):
    class Point:
        def __init__(self, answer):
            self.load = lambda: lambda *asked: answer

    points = {
        errors.CAUSES: [Point(None), Point({"device": 3, "phase": "load", "short_bytes": 5})],
        plan.PREDICTORS: [Point(None), Point("fits"), Point("never asked")],
    }
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points.get(group, []))
    cause = OutOfMemoryCause(device=3, phase="load", short_bytes=5)
    assert cause_of("OutOfMemoryError: full", "") == cause
    (spec,) = plan.plan_notebook(str(TARGETS / "one_fit.ipynb"), {}).specs
    assert plan.predict([spec]) == {spec.id: "fits"}
    points.clear()
    assert cause_of("OutOfMemoryError: full", "") == OutOfMemoryCause()
    assert plan.predict([spec]) == {}


def test_a_prediction_is_made_where_there_is_a_card_and_once_for_equal_settings(monkeypatch):
    from glm4v_nb import fit as fitting

    asked, fit = [], fitting.fit
    fitting._fit_once.cache_clear()  # another test may have asked for the same
    monkeypatch.setattr(
        fitting, "fit", lambda *given, **more: asked.append(1) or fit(*given, **more)
    )
    specs = plan.plan_file(ROOT / "sweeps" / "fit.toml").specs[:2]
    found = plan.predict([*specs, *specs])
    assert len(asked) == len(specs) == 2
    assert set(found.values()) <= {
        "fits",
        "does not fit: card 0, load",
        "does not fit: card 0, prefill",
    }
    precision = plan.plan_notebook(str(TARGETS / "one_precision.ipynb"), {})
    assert plan.predict(precision.specs) == {}
    low = plan.plan_notebook(str(TARGETS / "one_fit.ipynb"), {"device_map": "balanced_low_0"})
    assert list(plan.predict(low.specs).values()) == ["does not fit: card 1, load"]


# --- the command line


def test_the_command_runs_a_dry_run_without_running_anything(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(
        display, "predict", lambda specs: {specs[0].id: "does not fit: card 0, load"}
    )
    code = cli.main(["sweep", str(SWEEPS[0]), "--dry-run", "--json", "--output", str(tmp_path)])
    planned = json.loads(capsys.readouterr().out)
    assert code == 0
    assert planned["name"] == "fit"
    assert planned["runs"][0]["predicted"] == "does not fit: card 0, load"
    assert planned["runs"][1]["predicted"] is None
    assert list(tmp_path.iterdir()) == []
    assert cli.main(["sweep", str(SWEEPS[0]), "--dry-run"]) == 0
    assert "24 runs, about 2.4 minutes" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["01", "notebooks/01_small.ipynb"])
def test_the_command_runs_one_notebook_with_parameters_and_reports(
    capsys, registry, tmp_path, monkeypatch, name
):
    monkeypatch.chdir(tmp_path)  # where notebooks/registry.toml is found
    arguments = ["run", name, "-p", "number", "4", "-p", "name", "b", "--output", "runs"]
    assert cli.main(arguments) == 0
    assert "name=b number=4" in capsys.readouterr().out
    page = tmp_path / "runs" / "01_small" / "report.html"
    assert page.is_file()
    assert cli.main(["report", str(page.parent)]) == 0
    assert str(page) in capsys.readouterr().out
    assert cli.main(["report", str(page.parent), "--compare", str(page.parent)]) == 0
    assert (page.parent / "changes-from-01_small.html").is_file()


def test_a_notebook_without_a_registry_is_run_by_its_path(tmp_path, registry, monkeypatch, capsys):
    alone = tmp_path / "elsewhere" / "mine.ipynb"
    alone.parent.mkdir()
    alone.write_bytes((registry.parent / "01_small.ipynb").read_bytes())
    monkeypatch.chdir(alone.parent)

    def nowhere(given):
        raise RegistryError("there is no notebooks/registry.toml")

    monkeypatch.setattr(plan, "find_registry", nowhere)
    assert cli.main(["run", "mine.ipynb", "-p", "number", "2", "--output", "runs"]) == 0
    assert "mine.ipynb" in capsys.readouterr().out


def test_outside_a_clone_the_command_says_where_notebooks_are_expected(tmp_path):
    # As an installed package is: nothing is beside it.
    code = "import sys, nbsweep.registry as r; r.__file__ = '/nowhere/nbsweep/registry.py'\n"
    code += "from nbsweep.cli import main; sys.exit(main(sys.argv[1:]))"
    for arguments, expected in ((["run"], 2), (["run", "01", "-p", "a", "1"], 2)):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == expected
        assert done.stderr.startswith("error: there is no notebooks/registry.toml in this folder")
        assert done.stderr.count("\n") == 1
    done = subprocess.run([sys.executable, "-c", code, "run", "--help"], cwd=tmp_path)
    assert done.returncode == 0


def test_the_registry_may_be_named_by_a_variable(registry, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setenv("NBSWEEP_REGISTRY", str(registry))
    assert [spec.title for spec in plan.plan_suite().specs] == ["Small"]


def test_both_command_lines_have_the_same_commands(capsys):
    import glm4v_nb.cli

    arguments = ["sweep", str(SWEEPS[0].with_name("none.toml"))]
    assert (cli.main(arguments), glm4v_nb.cli.main(arguments)) == (2, 2)
    first, second = capsys.readouterr().err.splitlines()
    assert first == second and "none.toml: cannot be read" in first


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["run", "01", "-p", "card"], "-p needs a name and a value"),
        (["run", "01", "-p", "card", "L4", "-p", "card", "T4"], "-p card is given twice"),
        (["run", "-p", "card", "L4"], "-p is for one notebook"),
        (["run", "01", "02", "-p", "card", "L4"], "-p is for one notebook"),
        (["sweep", "nowhere.toml"], "nowhere.toml: cannot be read"),
        (["report", "nowhere"], "nowhere holds no sweep.json"),
    ],
)
def test_wrong_use_of_the_commands_says_what_is_expected(capsys, arguments, error):
    assert cli.main(arguments) in (1, 2)
    assert error in capsys.readouterr().err


def test_the_sweep_file_of_the_readme_is_right(tmp_path):
    readme = (ROOT / "nbsweep" / "README.md").read_text(encoding="utf-8")
    (file,) = re.findall(r"```toml\n(.*?)```", readme, flags=re.DOTALL)
    (tmp_path / "seeds.toml").write_text(file)
    cells = [nbformat.v4.new_code_cell("seed = 0\nrate = 1.0\nsteps = 1")]
    cells[0].metadata["tags"] = ["parameters"]
    cells.append(nbformat.v4.new_code_cell("print(seed, rate, steps)"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "mine.ipynb")
    assert len(plan.plan_file(tmp_path / "seeds.toml").specs) == 6
    commands = re.findall(r"^nbsweep (\w+)", readme, flags=re.MULTILINE)
    assert commands == ["run", "sweep", "report"]
