"""Sweeps on this machine: how runs end, what is repeated, what is left, and what is refused."""

import errno
import io
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from jupyter_client.connect import LocalPortCache
from rich.console import Console
from run_cells import ENDINGS, KEEP

from nbsweep import execute, runner, store
from nbsweep.plan import Plan, plan_notebook, run_spec
from nbsweep.provenance import package_hash
from nbsweep.registry import Notebook, NotebookEntry, Registry
from nbsweep.runner import carry_out, run_sweep
from nbsweep.store import Outcome, SweepError, only_process, prepare, read_sweep, write_whole
from nbsweep.sweepfile import WantedRun

# Nothing here imports torch, so that a run takes a second or two. Figures are recorded as `record`
# does.
PARAMETERS = 'number = 1\nmode = "done"\nseconds = 0.0'
RECORD = f"""
import json, os, signal, subprocess, sys, time
{KEEP}
with open("executions.txt", "a") as log:
    log.write(f"{{number}} begins {{os.getpid()}}\\n")
keep("begin", number)
"""
BODY = ENDINGS + "time.sleep(seconds)"
END = """
keep("square", number * number)
with open("executions.txt", "a") as log:
    log.write(f"{number} ends {os.getpid()}\\n")
"""
ENTRY = {"title": "Small", "tier": "core", "hardware": "any", "timeout_seconds": 60}


def write_notebook(path: Path, *sources: str):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


@pytest.fixture
def notebooks(tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    write_notebook(folder / "01_small.ipynb", PARAMETERS, RECORD, BODY, END)
    return folder


def make_plan(name, notebooks, *settings, seconds=60, minutes=None):
    """A plan of runs of 01_small.ipynb, or of the file that a setting has as "file"."""
    registry = Registry(folder=notebooks)
    found, specs = {}, []
    for given in settings:
        given = dict(given)
        path = notebooks / given.pop("file", "01_small.ipynb")
        expected = (minutes or {}).get(path.name, 1.0)
        entry = NotebookEntry(file=path.name, minutes=expected, **ENTRY)
        found[path.name] = Notebook(path, entry, registry)
        wanted = WantedRun(found[path.name], given, seconds)
        specs.append(run_spec(wanted, package_hash(registry.packages)))
    return Plan(name, specs, found)


def executions(notebooks, word="ends") -> list[int]:
    path = notebooks / "executions.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [int(line.split()[0]) for line in lines if f" {word} " in line]


def test_every_way_to_end_is_a_class_with_its_cause(notebooks, tmp_path):
    modes = ("done", "oom", "failed", "killed", "hung")
    settings = [{"mode": mode, "number": 3} for mode in modes]
    plan = make_plan("ends", notebooks, *settings, seconds=4)
    begin = time.monotonic()
    runs = run_sweep(plan, tmp_path / "runs" / "ends", workers=2)
    outcomes = {run.spec.parameters["mode"]: run.outcome for run in runs}
    assert [outcomes[mode].status for mode in modes] == [
        "done",
        "oom",
        "failed",
        "killed",
        "timeout",
    ]
    cause = outcomes["oom"].oom
    assert (cause.device, cause.short_bytes) == (1, 2**30)
    assert outcomes["failed"].signature == "ValueError: number # at <object object at #x…> of …"
    assert outcomes["failed"].failed_cell == 3
    assert "raise ValueError" in outcomes["failed"].traceback
    assert outcomes["killed"].seconds < 10, "a dead kernel is noticed"
    assert "4 seconds" in outcomes["hung"].error
    assert time.monotonic() - begin < 45
    assert [(record.name, record.value) for record in runs[0].records] == [
        ("begin", 3),
        ("square", 9),
    ]
    # What the hung notebook had started, in a session of its own, is gone too; another test's is
    # elsewhere.
    assert not [
        each
        for each in psutil.process_iter(["cmdline", "cwd"])
        if "time.sleep(300)" in str(each.info["cmdline"]) and each.info["cwd"] == str(notebooks)
    ]


def test_a_kernel_whose_port_another_process_took_is_started_again(
    notebooks, tmp_path, monkeypatch
):
    choose, chosen = LocalPortCache.find_available_port, []
    with socket.create_server(("127.0.0.1", 0)) as taken:

        def find(self, address):
            port = choose(self, address) if chosen else taken.getsockname()[1]
            chosen.append(port)
            return port

        monkeypatch.setattr(LocalPortCache, "find_available_port", find)
        (run,) = run_sweep(make_plan("ports", notebooks, {}), tmp_path / "runs")
    assert (run.outcome.status, run.outcome.error, len(chosen)) == ("done", None, 10)


def test_what_has_ended_is_not_repeated_unless_asked_for_and_what_was_killed_is(
    notebooks, tmp_path
):
    directory = tmp_path / "runs" / "again"
    settings = ({"number": 1}, {"number": 2, "mode": "failed"}, {"number": 3, "mode": "killed"})
    plan = make_plan("again", notebooks, *settings)
    run_sweep(plan, directory)
    assert executions(notebooks, "begins") == [1, 2, 3]
    run_sweep(plan, directory)
    assert executions(notebooks, "begins")[3:] == [3]
    run_sweep(plan, directory, retry=True)
    assert executions(notebooks, "begins")[4:] == [2, 3]
    run_sweep(plan, directory, force=True)
    assert executions(notebooks, "begins")[6:] == [1, 2, 3]
    assert [len(run.records) for run in read_sweep(directory)[1]] == [2, 1, 1], (
        "of the last time only"
    )


def test_the_longest_notebook_begins_first_and_runs_of_one_keep_their_order(notebooks, tmp_path):
    (notebooks / "02_long.ipynb").write_bytes((notebooks / "01_small.ipynb").read_bytes())
    settings = ({"number": 1}, {"number": 2}, {"number": 3, "file": "02_long.ipynb"})
    minutes = {"01_small.ipynb": 1.0, "02_long.ipynb": 2.0}
    runs = run_sweep(make_plan("order", notebooks, *settings, minutes=minutes), tmp_path / "runs")
    assert [run.outcome.error for run in runs] == [None] * 3
    assert executions(notebooks) == [3, 1, 2]
    assert [run.spec.parameters["number"] for run in runs] == [1, 2, 3]


def test_a_changed_notebook_parameter_or_checkpoint_is_another_run_and_its_outputs_are_none(
    notebooks, tmp_path
):
    def identity(given):
        return make_plan("a", notebooks, given).specs[0].id

    first = identity({"number": 1})
    assert identity({"number": 1}) == first
    assert identity({"number": 2}) != first
    path = notebooks / "01_small.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="seen")]
    notebook.cells[1].execution_count = 7
    nbformat.write(notebook, path)
    assert identity({"number": 1}) == first
    notebook.cells[1].source += "\n"
    nbformat.write(notebook, path)
    assert identity({"number": 1}) != first
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    write_notebook(path, f"checkpoint = {str(checkpoint)!r}", "print(checkpoint)")
    ids = set()
    for text in ("{}", "{} "):
        (checkpoint / "config.json").write_text(text)
        ids.add(identity({}))
    assert len(ids) == 2


def everything_in(folder: Path) -> dict[Path, tuple]:
    return {
        path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in folder.rglob("*")
    }


def test_a_second_command_is_refused_before_it_has_changed_anything(notebooks, tmp_path):
    directory = tmp_path / "runs" / "busy"
    run_sweep(make_plan("busy", notebooks, {"number": 1}), directory)
    with only_process(directory):
        before = everything_in(directory)
        with pytest.raises(SweepError, match="another process is running"):
            run_sweep(make_plan("other", notebooks, {"number": 2}, {"number": 3}), directory)
        assert everything_in(directory) == before


def test_an_outcome_that_cannot_be_written_stops_the_sweep_and_the_next_one_does_the_run(
    notebooks, tmp_path, monkeypatch
):
    directory = tmp_path / "runs" / "full"
    plan = make_plan("full", notebooks, {"number": 4})

    def full(path, content):
        if path.name == "executed.ipynb":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_whole(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_whole", full)
        with pytest.raises(
            SweepError, match="could not be written: .*No space left.*run the same command again"
        ):
            run_sweep(plan, directory)
    assert not (directory / plan.specs[0].id / "outcome.json").exists()
    (run,) = run_sweep(plan, directory)
    assert run.outcome.status == "done"
    assert [record.value for record in run.records] == [4, 16]


def test_a_run_that_this_machine_cannot_do_stops_the_sweep_and_has_no_outcome(
    notebooks, tmp_path, monkeypatch
):
    plan = make_plan("full", notebooks, {"number": 4})

    async def full(self, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(execute.NotebookClient, "async_execute", full)
        with pytest.raises(SweepError, match="could not be done: .*No space left"):
            run_sweep(plan, tmp_path / "runs")
    assert read_sweep(tmp_path / "runs")[1][0].outcome is None


def test_a_sweep_on_a_full_disk_cannot_be_prepared_and_says_so(notebooks, tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "write_whole", full)
    with pytest.raises(
        SweepError, match="No space left on device. Free space or choose another --output"
    ):
        prepare(tmp_path / "runs", "full", make_plan("full", notebooks, {"number": 1}).specs)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old")
    monkeypatch.setattr(
        os, "fsync", lambda number: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))
    )
    with pytest.raises(OSError, match="full"):
        write_whole(path, "new")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("name", ["outcome.json", "spec.json", "records.jsonl"])
@pytest.mark.parametrize("content", [b"", b'{"status": "do', b"\xff\xfe", b'{"status": "great"}\n'])
def test_a_file_of_a_run_that_something_has_damaged_costs_that_run_alone(
    notebooks, tmp_path, name, content
):
    directory = tmp_path / "runs" / "damaged"
    plan = make_plan("damaged", notebooks, {"number": 1}, {"number": 2})
    outcome = Outcome(status="done", started="now", seconds=1.0)
    prepare(directory, plan.name, plan.specs)
    for spec in plan.specs:
        store.keep(directory / spec.id, outcome)
    (directory / plan.specs[0].id / name).write_bytes(content)
    runs = run_sweep(plan, directory)
    assert [run.status for run in runs] == ["done", "done"]
    whole = name == "spec.json" or (name == "records.jsonl" and not content)
    assert executions(notebooks) == ([] if whole else [1])
    assert json.loads((directory / plan.specs[0].id / "spec.json").read_text())["given"]


def test_a_damaged_list_of_runs_is_named_and_the_next_sweep_writes_it_anew(notebooks, tmp_path):
    directory = tmp_path / "runs" / "bad"
    with pytest.raises(FileNotFoundError, match="holds no sweep.json"):
        read_sweep(directory)
    plan = make_plan("bad", notebooks, {"number": 1})
    run_sweep(plan, directory)
    (directory / "sweep.json").write_text('{"name": ')
    with pytest.raises(ValueError, match="sweep.json is not valid"):
        read_sweep(directory)
    assert run_sweep(plan, directory)[0].status == "done"
    assert executions(notebooks) == [1]


def test_a_line_of_records_that_a_run_was_ended_in_is_left_out(notebooks, tmp_path):
    source = (
        f"{RECORD}\nopen(os.environ['NBSWEEP_RECORDS'], 'a').write('{{\"name\": ')\nos._exit(1)"
    )
    outcome, folder = outcome_of(notebooks, tmp_path, source)
    assert outcome.status == "killed"
    assert [record.name for record in store.read_records(folder / "records.jsonl")] == ["begin"]


@pytest.mark.parametrize("content", ["bytes(range(256))", "b'\\x89PNG'", "b'[1]\\n'", "b'\\n'"])
def test_a_run_that_spoils_its_own_records_has_failed_and_says_by_what(
    notebooks, tmp_path, content
):
    source = f"{RECORD}\nopen(os.environ['NBSWEEP_RECORDS'], 'ab').write({content})"
    outcome, folder = outcome_of(notebooks, tmp_path, source)
    assert outcome.status == "failed"
    assert "no figures are kept: line 2 of records.jsonl is no record, but b'" in outcome.error
    assert not (folder / "records.jsonl").exists()
    assert read_sweep(tmp_path / "runs")[1][0].status == "failed", "and is not done again for ever"


def test_an_outcome_reads_back_as_it_was_written(tmp_path):
    outcome = Outcome(status="done", started="now", seconds=1.5)
    write_whole(tmp_path / "outcome.json", outcome.model_dump_json())
    assert Outcome.model_validate_json((tmp_path / "outcome.json").read_text()) == outcome


# What a notebook may do


def outcome_of(notebooks, tmp_path, source, **given):
    write_notebook(notebooks / "01_small.ipynb", "number = 1", source)
    plan = make_plan("one", notebooks, given)
    (run,) = run_sweep(plan, tmp_path / "runs")
    return run.outcome, tmp_path / "runs" / run.spec.id


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("\\nThe library sentencepiece is missing.\\n", "The library sentencepiece is missing."),
        ("one\\u2028two\\x85three", "one two three"),
        ("first\\nsecond", "first"),
        ("half of a character: \\udcff", "half of a character: �"),
    ],
)
def test_the_error_of_a_run_is_one_line_that_says_something(notebooks, tmp_path, message, error):
    outcome, _ = outcome_of(notebooks, tmp_path, f'print(number)\nraise ImportError("{message}")')
    assert outcome.status == "failed"
    assert outcome.error == f"ImportError: {error}"


def test_a_kernel_that_raises_a_group_is_told_by_its_leaves_and_may_have_run_out_of_memory(
    notebooks, tmp_path
):
    full = "type('OutOfMemoryError', (RuntimeError,), {})('CUDA out of memory.')"
    source = f"print(number)\nraise ExceptionGroup('both', [KeyError('a'), {full}])"
    outcome, _ = outcome_of(notebooks, tmp_path, source)
    assert outcome.status == "oom"
    assert outcome.error == (
        "ExceptionGroup: both (2 sub-exceptions): KeyError: 'a'; OutOfMemoryError: CUDA out of"
        " memory."
    )


def test_a_message_of_megabytes_is_cut_in_the_outcome_and_whole_in_the_notebook(
    notebooks, tmp_path
):
    outcome, folder = outcome_of(
        notebooks, tmp_path, "print(number)\nraise ValueError('x' * 10**6)"
    )
    assert (folder / "outcome.json").stat().st_size < 40_000
    assert "shortened from 1,000,012 characters; executed.ipynb has all" in outcome.error
    assert "x" * 10**6 in (folder / "executed.ipynb").read_text()


def test_a_notebook_may_end_itself_but_not_by_a_cell_that_is_to_fail(notebooks, tmp_path):
    done, _ = outcome_of(notebooks, tmp_path, "print(number)\nimport sys; sys.exit()")
    assert done.status == "done"
    tagged = nbformat.read(notebooks / "01_small.ipynb", as_version=4)
    tagged.cells[1].source = "print(number); 1 / 0"
    tagged.cells[1].metadata["tags"] = ["raises-exception"]
    nbformat.write(tagged, notebooks / "01_small.ipynb")
    plan = make_plan("two", notebooks, {})
    assert run_sweep(plan, tmp_path / "two")[0].status == "failed", "as papermill has it"


def test_what_a_run_leaves_names_no_path_of_this_machine_and_no_other_place(notebooks, tmp_path):
    source = (
        "import os, sys, json, tempfile\nprint(number, os.getcwd(), sys.executable)\n"
        "os.write(2, (os.getcwd() + '\\n').encode())\n"
        "from IPython.display import HTML, display; display(HTML(f'<a>{os.getcwd()}</a>'))\n"
        "display({'application/json': {'at': [os.getcwd()]}, 'text/plain': ''}, raw=True)\n"
        "json.loads(tempfile.gettempdir() + sys.prefix)"
    )
    _, folder = outcome_of(notebooks, tmp_path, source, number=2)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "spec.json",
        "outcome.json",
        "executed.ipynb",
        "executed.html",
        "executed.kernel.log",
    }
    for path in folder.iterdir():
        text = path.read_text()
        for machine in (str(tmp_path), sys.prefix, sys.base_prefix + "/", str(Path.home()) + "/"):
            assert machine not in text, f"{machine} in {path.name}"
    page = (folder / "executed.html").read_text()
    assert "https://cdn" not in page and 'src="http' not in page


def test_a_notebook_that_is_saved_while_its_sweep_runs_is_not_kept_under_its_old_source(
    notebooks, tmp_path
):
    directory = tmp_path / "runs" / "moved"
    settings = [{"number": 1}, {"number": 2, "seconds": 2.0}, {"number": 3}]
    plan = make_plan("moved", notebooks, *settings)
    path = notebooks / "01_small.ipynb"
    old = path.read_bytes()
    notes = []

    def edit(progress):
        notes.extend(note for note in progress.notes if note not in notes)
        if executions(notebooks, "begins") == [1, 2] and path.read_bytes() == old:
            write_notebook(path, PARAMETERS, RECORD, BODY, END + "print('new')")

    runs = run_sweep(plan, directory, show=edit)
    assert [run.status for run in runs] == ["done", "not run", "not run"]
    assert executions(notebooks, "begins") == [1, 2], "the last was not begun"
    assert notes == [
        "01_small.ipynb or its checkpoint was changed while the sweep ran; the runs concerned are"
        " not kept. Run the same command again."
    ]
    path.write_bytes(old)  # the edit is taken back
    assert [run.status for run in run_sweep(plan, directory)] == ["done"] * 3
    assert executions(notebooks, "begins") == [1, 2, 2, 3]


@pytest.mark.parametrize("when", ["before it begins", "while it runs"])
def test_a_package_that_is_changed_while_its_sweep_runs_is_not_kept(
    notebooks, tmp_path, monkeypatch, when
):
    package = tmp_path / "somepackage"
    package.mkdir()
    (package / "__init__.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry = notebooks / "registry.toml"
    entry = 'file = "01_small.ipynb"\ntitle = "a"\ntier = "core"\nhardware = "any"\n'
    registry.write_text(
        f'packages = ["somepackage"]\n[[notebook]]\n{entry}timeout_seconds = 60\nminutes = 1\n'
    )
    plan = plan_notebook("1", {"seconds": "1.0"}, registry)
    if when == "before it begins":
        (package / "__init__.py").write_text("value = 2\n")
    else:

        def change(progress):
            if executions(notebooks, "begins"):
                (package / "__init__.py").write_text("value = 2\n")

        monkeypatch.setattr("nbsweep.display.Display.show", lambda self, progress: change(progress))
    runs, _ = carry_out(plan, tmp_path / "runs", 1, Console(file=io.StringIO()))
    assert [run.status for run in runs] == ["not run"]
    assert executions(notebooks, "begins") == ([] if when == "before it begins" else [1])


def test_on_windows_a_sweep_says_where_it_runs_and_touches_nothing(
    notebooks, tmp_path, monkeypatch
):
    plan = make_plan("windows", notebooks, {"number": 1})
    with monkeypatch.context() as patch:
        patch.setattr(runner.sys, "platform", "win32")
        with pytest.raises(SweepError, match="on Linux and macOS alone; on Windows run it in WSL"):
            run_sweep(plan, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_report_is_written_where_python_lacks_what_windows_lacks(notebooks, tmp_path):
    run_sweep(make_plan("plain", notebooks, {"number": 1}), tmp_path / "runs")
    code = """
import os, signal, sys
for name in ("fcntl", "pwd", "grp", "resource", "termios"):
    sys.modules[name] = None
for module, names in ((signal, ("SIGHUP", "SIGKILL")), (os, ("getpgrp", "setsid", "getppid"))):
    for name in names:
        delattr(module, name)
from nbsweep.cli import main
sys.exit(main(["report", sys.argv[1]]))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "report.html").is_file()


def test_a_whole_sweep_imports_neither_torch_nor_the_other_packages(notebooks, tmp_path):
    code = """
import sys
from pathlib import Path
from nbsweep.cli import main
modes = '["done", "failed", "oom"]'
file = Path(sys.argv[1]) / "modes.toml"
file.write_text(f'[[runs]]\\nnotebook = "notebooks/01_small.ipynb"\\ngrid.mode = {modes}\\n')
code = main(["sweep", str(file), "--output", sys.argv[1], "--registry", sys.argv[2]])
assert code == 1, code
loaded = {name.partition(".")[0] for name in sys.modules}
print(sorted(loaded & {"torch", "transformers", "glm4v_nb", "distributed"}))
import psutil
print(psutil.Process().memory_info().rss // 2**20)
"""
    registry = notebooks / "registry.toml"
    entry = 'file = "01_small.ipynb"\ntitle = "a"\ntier = "core"\nhardware = "any"\n'
    registry.write_text(f"[[notebook]]\n{entry}timeout_seconds = 60\nminutes = 1\n")
    command = [sys.executable, "-c", code, str(tmp_path), str(registry)]
    done = subprocess.run(command, capture_output=True, text=True)
    *_, loaded, memory = done.stdout.splitlines()
    assert loaded == "[]", done.stderr
    assert int(memory) < 250, "MiB: Jupyter's client, pydantic, nbconvert and pyarrow"
