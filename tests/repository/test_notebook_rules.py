"""Every rule for notebooks: a notebook that breaks it and nothing else, and what is said about
it."""

import ast
import base64
import io
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from notebook_rules import __main__ as program
from notebook_rules import machine_traces
from notebook_rules.__main__ import main, validate
from notebook_rules.machine_traces import find_machine_traces
from notebook_rules.stored import (
    MAX_BYTES,
    NB_CLEAN_OPTIONS,
    RUNNER_VARIABLES,
    asks_for_its_runner,
    check_notebook,
)
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import glm4v_nb.cli
from nbsweep.registry import NotebookEntry

ROOT = Path(__file__).parents[2]
ENTRY = NotebookEntry(
    file="01_lesson.ipynb",
    title="Lesson",
    tier="core",
    hardware="none",
    timeout_seconds=10,
    minutes=1,
)


def printed(text, name="stdout"):
    return new_output("stream", name=name, text=text)


def picture(alternative="Two points.", **texts):
    """A picture as a cell shows it, with an alternative text beside it and texts in its file."""
    info, file = PngInfo(), io.BytesIO()
    for key, value in texts.items():
        info.add_text(key, value)
    Image.new("RGB", (2, 2)).save(file, "png", pnginfo=info)
    data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": "<Figure>"}
    metadata = {"image/png": {"alt": alternative}} if alternative else {}
    return new_output("display_data", data=data, metadata=metadata)


def bomb() -> str:
    """A picture of 900 million points in a hundred bytes."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    content = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
    return base64.b64encode(content).decode()


def shown(kind, content):
    return new_output("display_data", data={kind: content}, metadata={kind: {"alt": "Two points."}})


def code(source, *outputs, tags=()):
    cell = new_code_cell(source, outputs=list(outputs), execution_count=2)
    if tags:
        cell.metadata["tags"] = list(tags)
    return cell


@pytest.fixture
def lesson():
    """A notebook that keeps every rule; its third code cell is the one to spoil."""
    return new_notebook(
        metadata={
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}
        },
        cells=[
            new_markdown_cell("# 01 · Lesson\n\nWhat it is about."),
            code('card = "L4"', tags=["parameters"]),
            code("print(card)", printed("L4\n")),
            code("1 + 1"),
        ],
    )


@pytest.fixture
def check(tmp_path):
    """Writes a notebook and returns what is found in it."""

    def write_and_check(notebook, entry=ENTRY):
        path = tmp_path / "01_lesson.ipynb"
        nbformat.write(notebook, path)
        return check_notebook(path, entry)

    return write_and_check


def test_a_notebook_that_keeps_every_rule_has_no_finding(lesson, check):
    assert check(lesson) == []


ZERO_DIVISION = new_output(
    "error", ename="ZeroDivisionError", evalue="division by zero", traceback=[]
)
# Name → rule, cell, words of the problem, words of the advice.
BAD_CELLS = {
    "a picture without words": (
        "alternative-text",
        code("plot_it()", picture("", label="x"), tags=["illustration"]),
        "its output of kind image/png has no alternative text",
        "describe(picture",
    ),
    "a long line": (
        "shape",
        code(f"name = {'x' * 94!r}"),
        "has 103 characters; expected at most 100 a line",
        "Break the line",
    ),
    "a comment for nbval": (
        "shape",
        code("# NBVAL_CHECK_OUTPUT\n1 + 1"),
        "the comment NBVAL_CHECK_OUTPUT",
        "Tag the cell nbval-check-output",
    ),
    "an assertion": (
        "shape",
        code("if 1:\n    assert 1 + 1 == 2"),
        "it asserts something",
        "say what it expected",
    ),
    "an error": (
        "error",
        code("1 / 0", ZERO_DIVISION),
        "ended with ZeroDivisionError",
        "catch the exception",
    ),
    "a tag for an error": (
        "error",
        code("1", tags=["raises-exception"]),
        "papermill does not",
        "Catch",
    ),
    "a mark for an error": (
        "error",
        code("# NBVAL_RAISES_EXCEPTION\n1"),
        "papermill does not",
        "Catch",
    ),
    "a warning": (
        "stderr",
        code("warn()", printed("UserWarning: old\nwarn()\n", "stderr")),
        "wrote 'UserWarning: old' to stderr",
        "tag the cell writes-stderr",
    ),
    "a printed path": (
        "machine-path",
        code("print(path)", printed("in /home/ada/model\n")),
        "names /home/ada,",
        "relative to the notebook",
    ),
    "a path that is shown": (
        "machine-path",
        code("path", shown("text/plain", "PosixPath('/tmp/x1/log')")),
        "names /tmp/x1,",
        "relative to the notebook",
    ),
    "a path in HTML": (
        "machine-path",
        code("page", shown("text/html", "<a href='file:///Users/ada/a.html'>a</a>")),
        "names /Users/ada,",
        "relative to the notebook",
    ),
    "a path in JSON": (
        "machine-path",
        code("data", shown("application/json", {"at": "C:\\Users\\ada\\model"})),
        "ada",
        "relative to the notebook",
    ),
    "a path in a picture's file": (
        "machine-path",
        code("plot_it()", picture(Source="/home/ada/plot.py")),
        "names /home/ada,",
        "relative to the notebook",
    ),
    "a path in the code": (
        "machine-path",
        code('open("/home/ada/log")'),
        "/home/ada",
        "temporary folder",
    ),
    "a picture without a label": (
        "picture-label",
        code("figure", picture()),
        "where the figures of its picture come from",
        "tag the cell illustration",
    ),
    "a drawing without a label": (
        "picture-label",
        code("drawing", shown("image/svg+xml", "<svg/>")),
        "where the figures of its picture come from",
        "tag the cell illustration",
    ),
    "a picture that is cut off": (
        "format",
        code("plot_frontier(points)", shown("image/png", base64.b64encode(b"cut").decode())),
        "image/png is no picture that can be read",
        "Run the notebook again",
    ),
    "a picture that is a trap": (
        "format",
        code("plot_frontier(points)", shown("image/png", bomb())),
        "image/png is no picture that can be read",
        "Run the notebook again",
    ),
    "a path in colour": (
        "machine-path",
        code("print(path)", printed("saved \x1b[32m/home/ada/model\x1b[0m\n")),
        "names /home/ada,",
        "relative to the notebook",
    ),
    "a record without a label": (
        "record-label",
        code('record("peak", 5)', printed("peak: 5\n")),
        "labels none",
        "Let `record` print them",
    ),
    "bytes without a label": (
        "figure-label",
        code("print(peak)", printed("peak 20.1 GiB\n")),
        "'peak 20.1 GiB'",
        "beside it",
    ),
    "a speed without a label": (
        "figure-label",
        code("print(rate)", printed("374 tokens/s\n")),
        "374 tokens/s",
        "beside it",
    ),
    "a skipped cell": (
        "same-code",
        code("train()", tags=["nbval-skip"]),
        "skip it",
        "value of a parameter",
    ),
    "a mark for skipping": (
        "same-code",
        code("# NBVAL_SKIP\ntrain()"),
        "skip it",
        "value of a parameter",
    ),
    "code that asks for CI": (
        "same-code",
        code('import os\nsteps = 1 if os.environ.get("CI") else 100'),
        "for the variable CI",
        "value of a parameter",
    ),
    "code that asks for pytest": (
        "same-code",
        code('import sys\nif "pytest" not in sys.modules:\n    train()'),
        "whether pytest is loaded",
        "value of a parameter",
    ),
}


@pytest.mark.parametrize("name", BAD_CELLS)
def test_a_cell_that_breaks_a_rule_is_the_only_finding_with_its_number_and_what_to_do(
    name, lesson, check
):
    rule, cell, problem, advice = BAD_CELLS[name]
    lesson.cells[3] = cell
    (finding,) = check(lesson)
    assert (finding.notebook, finding.where, finding.rule) == (
        "01_lesson.ipynb",
        "code cell 3",
        rule,
    )
    assert problem in finding.problem and advice in finding.advice
    assert str(finding).startswith("01_lesson.ipynb, code cell 3: ")


def test_a_path_in_the_text_of_a_lesson_is_found_with_the_number_of_the_text(lesson, check):
    lesson.cells.append(new_markdown_cell("Look into `/home/ada/runs`."))
    (finding,) = check(lesson)
    assert (finding.where, finding.rule) == ("text cell 2", "machine-path")


def too_large(lesson):
    lesson.cells[3].source = MAX_BYTES // 50 * f"# {'x' * 50}\n"
    lesson.cells.append(code("2 + 2"))


def two_parameter_cells(lesson):
    lesson.cells[3].metadata["tags"] = ["parameters"]


def no_parameters(lesson):
    lesson.cells[1].metadata = {}


def computed_parameters(lesson):
    lesson.cells[1].source = "card = choose()"


def parameter_that_nothing_reads(lesson):
    lesson.cells[2].source = "print('L4')"


def other_title(lesson):
    lesson.cells[0].source = "# 01 · Another lesson"


def other_kernel(lesson):
    lesson.metadata.kernelspec.name = "my-env"


def no_kernel(lesson):
    del lesson.metadata["kernelspec"]


def widget_state(lesson):
    lesson.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {}}


def execution_times(lesson):
    lesson.cells[3].metadata["execution"] = {"iopub.execute_input": "2026-11-25T21:00:00Z"}


def nothing_run(lesson):
    lesson.cells[2].outputs = []


def wordy(lesson):
    lesson.cells[0].source = "# 01 · Lesson\n\n" + "word " * 58


def long_cells(lesson):
    lesson.cells[3:] = [code("1 + 1\n" * 7), code("2 + 2\n" * 7), code("3 + 3\n" * 7)]


BAD_NOTEBOOKS = [
    (wordy, "shape", "have 62 words at the median; expected at most 60", "Say less"),
    (long_cells, "shape", "have 7 lines at the median; expected at most 6", "Move what is not"),
    (too_large, "size", "expected at most 300,000", "Draw fewer"),
    (two_parameter_cells, "parameters", "has 2 of them", "Put the tag on the one cell"),
    (no_parameters, "parameters", "but has none", "Put the tag on the one cell"),
    (computed_parameters, "parameters", "'card = choose()'", "name = a plain"),
    (
        parameter_that_nothing_reads,
        "parameters",
        "setting card changes nothing",
        "Read it in a later cell",
    ),
    (other_title, "registered", "'# 01 · Another lesson'; expected '# 01 · Lesson'", "agree"),
    (other_kernel, "kernelspec", "'my-env'; expected 'python3'", "Python 3"),
    (no_kernel, "kernelspec", "None; expected 'python3'", "Python 3"),
    (widget_state, "metadata", "has widgets", "Remove"),
    (execution_times, "metadata", "finds cell 3: metadata execution", "nb-clean clean"),
    (nothing_run, "outputs", "no cell has a stored output", "tools/refresh_notebooks.py 01"),
]


def test_a_lesson_says_what_it_takes_as_the_registry_does(lesson, check):
    takes = "# 01 · Lesson\n\n**Takes** about {} minute to run, {} to read."
    entry = ENTRY.model_copy(update={"reading_minutes": 1})
    lesson.cells[0].source = takes.format(1, 1)
    assert check(lesson, entry) == []
    for said in (takes.format(1, 2), takes.format(2, 1), "# 01 · Lesson"):
        lesson.cells[0].source = said
        (finding,) = check(lesson, entry)
        assert finding.rule == "reading-time"
        assert "'**Takes** about 1 minutes to run, 1 to read'" in finding.problem
    lesson.cells[0].source = takes.format(1, 4)
    (finding,) = check(lesson, ENTRY.model_copy(update={"reading_minutes": 4}))
    assert "4 minutes to read; it has 20 words" in finding.problem


@pytest.mark.parametrize(
    ("text", "advice"),
    [("Look: ![](a.svg)", "![what it shows]"), ('<img src="a.png">', '<img alt="what it')],
)
def test_a_picture_in_a_text_has_an_alternative_text(text, advice, lesson, check):
    lesson.cells.append(new_markdown_cell(text))
    (finding,) = check(lesson)
    assert (finding.where, finding.rule) == ("text cell 2", "alternative-text")
    assert advice in finding.advice
    lesson.cells[-1].source = '![Two points](a.svg) and <img alt="one point" src="a.png">'
    assert check(lesson) == []


@pytest.mark.parametrize(("spoil", "rule", "problem", "advice"), BAD_NOTEBOOKS)
def test_a_notebook_that_breaks_a_rule_as_a_whole_has_that_finding_alone(
    spoil, rule, problem, advice, lesson, check
):
    spoil(lesson)
    (finding,) = check(lesson)
    assert (finding.notebook, finding.where, finding.rule) == ("01_lesson.ipynb", "", rule)
    assert problem in finding.problem and advice in f"{finding.problem} {finding.advice}"


def test_a_notebook_that_the_registry_does_not_list_is_found(lesson, check):
    (finding,) = check(lesson, entry=None)
    assert finding.rule == "registered" and "Add a [[notebook]] entry" in finding.advice


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"nbformat": 4}', '{"nbformat": 4, "nbformat_minor": 5, "cells": [7]}']
)
def test_a_file_that_is_no_notebook_is_one_finding(text, tmp_path):
    path = tmp_path / "01_lesson.ipynb"
    path.write_text(text)
    (finding,) = check_notebook(path, ENTRY)
    assert finding.rule == "format" and "Restore it" in finding.advice


def test_a_cell_without_an_id_and_one_with_anothers_are_named(lesson, tmp_path):
    path = tmp_path / "01_lesson.ipynb"
    content = json.loads(nbformat.writes(lesson))
    del content["cells"][0]["id"]
    content["cells"][3]["id"] = content["cells"][1]["id"]
    path.write_text(json.dumps(content))
    first, second = check_notebook(path, ENTRY)
    assert (first.where, first.rule) == ("text cell 1", "format")
    assert "it has no id" in first.problem and "save it" in first.advice
    assert (second.where, second.rule) == ("code cell 3", "format")
    assert f"the id {content['cells'][1]['id']!r} of a cell before it" in second.problem


def test_of_a_format_without_ids_every_cell_is_named(lesson, tmp_path):
    path = tmp_path / "01_lesson.ipynb"
    content = json.loads(nbformat.writes(lesson)) | {"nbformat_minor": 4}
    for cell in content["cells"]:
        del cell["id"]
    path.write_text(json.dumps(content))
    findings = check_notebook(path, ENTRY)
    assert [finding.where for finding in findings] == [
        "text cell 1", "code cell 1", "code cell 2", "code cell 3",
    ]  # fmt: skip


def test_what_jupyterlab_writes_when_a_notebook_is_only_opened_breaks_no_rule(lesson, check):
    lesson.metadata["kernelspec"]["display_name"] = "Python 3 (ipykernel)"
    lesson.metadata["language_info"] = {
        "codemirror_mode": {"name": "ipython", "version": 3},
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "nbconvert_exporter": "python",
        "pygments_lexer": "ipython3",
        "version": "3.13.1",
    }
    assert check(lesson) == []


GOOD_CELLS = {
    "stderr where it is the lesson": code(
        "warn()", printed("UserWarning\n", "stderr"), tags=["writes-stderr"]
    ),
    "a plot of this package": code("plot_frontier(points)", picture()),
    "a plot with the rig's provenance": code("axes.set_xlabel(rig.provenance)\nfigure", picture()),
    "a plot that says it in its code": code('axes.set_xlabel("simulated")\nfigure', picture()),
    "a plot with its label beside it": code("figure", printed("simulated\n"), picture()),
    "a plot with its label as alternative text": code(
        "figure", picture(alternative="Peaks, simulated")
    ),
    "a drawing": code("sample_pictures()", picture(), tags=["illustration"]),
    "a recorded figure": code(
        'record("peak", 5)', printed("peak: 5 GiB  (measured on H100, 2026-11-25)\n")
    ),
    "a printed figure": code("print(peak)", printed("peak 20.1 GiB  (simulated)\n")),
    "a number without a unit": code(
        "print(parameters)", printed("13,906,320,896 parameters, 2 cards\n")
    ),
    "an environment variable that is not a runner's": code(
        'import os\nos.environ["PYTORCH_CUDA_ALLOC_CONF"] = ""'
    ),
    "a magic": code("%time sum(range(9))"),
}


@pytest.mark.parametrize("name", GOOD_CELLS)
def test_no_false_alarm_for(name, lesson, check):
    lesson.cells[3] = GOOD_CELLS[name]
    assert check(lesson) == []


def test_a_section_or_the_opening_may_speak_for_its_printed_figures_but_not_the_section_before(
    lesson, check
):
    def figure():
        return code("print(peak)", printed("20.1 GiB\n"))

    lesson.cells += [
        new_markdown_cell("## On cards\n\nAll of it is *simulated*."),
        new_markdown_cell("More."),
        figure(),
    ]
    assert check(lesson) == []
    lesson.cells += [new_markdown_cell("Now really.\n\n## Elsewhere"), figure()]
    assert [finding.where for finding in check(lesson)] == ["code cell 5"]
    lesson.cells[0].source += " Every figure is *measured*."
    assert check(lesson) == []


@pytest.mark.parametrize(
    "text",
    [
        "/home/ada/x",
        "'/root/x'",
        "(/tmp/tmpab12/log.jsonl)",
        "/var/folders/zz/T",
        "/usr/lib/python3/x.py",
        "/mnt/disk/a",
        "/Users/ada",
        "file:///home/ada/x",
        "lib/python3.11/site-packages/torch/nn.py",
        r"C:\Users\ada\x",
        r"D:\\data\\x y\\z",
        "PATH=/usr/bin:/opt/bin",
    ],
)
def test_paths_of_a_machine_are_found(text):
    assert find_machine_traces(f"in {text}, it says")


# What rich, IPython and terminals put around and into a path; as text, as Python and JSON write it.
COLOURED = [
    "\x1b[32m/home/ada/x\x1b[0m",
    "\x1b[38;2;1;2;3m/home/\x1b[0m\x1b[1mada\x1b[0m",
    "\x1b[38:5:9m/home/ada",
    "\x1b[K/home/ada",
    "\x1b[?25l/home/ada",
    "\x1b(B\x1b[m/home/ada",
    "\x1bM/home/ada",
    "\x9b32m/home/ada",
    "\x1b]8;;file:///home/ada/x\x1b\\x\x1b]8;;\x1b\\",
    r"\x1b[32m/home/ada",
    r"\u001b[32m/home/ada",
    r"\033[32m/home/ada",
    '<span style="color: #800080">/home/ada</span>',
    '<span style="color: #800080">/home/</span><span style="color: #ff00ff">ada</span>',
]


@pytest.mark.parametrize("text", COLOURED)
def test_a_path_in_colour_is_found(text):
    assert any("/home/ada" in trace for trace in find_machine_traces(f"saved {text} there"))


def test_a_path_in_colour_is_found_wherever_an_output_has_it(lesson, check):
    path = "\x1b[32m/home/ada\x1b[0m"
    error = new_output("error", ename="E", evalue=path, traceback=[])
    for output in (
        printed(path),
        error,
        shown("application/json", {"at": [{"x": path}]}),
        shown("application/json", {path: 1}),
        shown("text/html", f"<pre>{path}</pre>"),
        new_output("display_data", data={"text/plain": ""}, metadata={"note": path}),
    ):
        lesson.cells[3] = code("1 + 1", output)
        assert "machine-path" in [finding.rule for finding in check(lesson)]


@pytest.mark.parametrize(
    "text",
    [
        "/content/model",
        "/layers/0",
        "model/layers/0",
        "and/or/not",
        "https://example.org/home/ada",
        "runs/tmp/x",
        "./tmp/x",
        "../var/x",
        "~/.cache/huggingface",
        "GiB/s",
        "/dev/nvidia0",
        "16 / 9 / 4",
        "12:30:01",
        "site-packages",
        "a: \\n",
        "{0: 9}",
        "zai-org/glm-4v-9b",
        "language_model.layers.39",
        "no /root",
        "</root>",
        "ratio 4:\\alpha",
    ],
)
def test_what_only_looks_like_a_path_is_not_found(text, monkeypatch):
    monkeypatch.setattr(machine_traces, "_of_this_machine", lambda: [])  # whose home may be /root
    assert find_machine_traces(f"in {text}, it says") == []


def test_this_machines_folders_host_and_user_are_found(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine_traces.platform, "node", lambda: "gpu-17")
    monkeypatch.setattr(machine_traces.getpass, "getuser", lambda: "ada")
    for text in (f"at {tmp_path}/log", sys.prefix, "on gpu-17.", "ada@elsewhere"):
        assert find_machine_traces(text), text
    for text in ("gpu-170", "Canada", "ada is a word"):
        assert not find_machine_traces(text), text
    monkeypatch.setattr(machine_traces.platform, "node", lambda: "laptop")
    assert not find_machine_traces("Needs a laptop")


def test_a_user_without_a_name_is_no_error(monkeypatch):
    def nobody():
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr(machine_traces.getpass, "getuser", nobody)
    assert find_machine_traces("fine") == []


def test_what_a_cell_prints_while_nbval_runs_it_keeps_the_same_rules(tmp_path):
    cells = [
        code("import sys, tempfile"),
        code("print('old', file=sys.stderr)"),
        code("print('old', file=sys.stderr)", tags=["writes-stderr"]),
        code("print(tempfile.mkdtemp())"),
        code("print('two')", printed("one\n"), tags=["nbval-check-output"]),
        code("print('two')", printed("one\n")),
        code("1 / 0"),
        code("from IPython.display import SVG; SVG('<svg xmlns=\"http://www.w3.org/2000/svg\"/>')"),
        code("print('after all that')"),
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "bad.ipynb")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST")
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        "--color",
        "no",
        "-p",
        "conftest",
        "-c",
        "pyproject.toml",
    ]
    command += [
        "--rootdir",
        str(ROOT),
        "-o",
        f"cache_dir={tmp_path / 'cache'}",
        str(tmp_path / "bad.ipynb"),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    said = dict(re.findall(r"^Cell (\d): (.*)$", done.stdout, flags=re.MULTILINE))
    assert sorted(said) == ["1", "3", "4", "6", "7"], done.stdout
    assert said["1"].startswith("it wrote 'old' to stderr.") and said["1"].endswith("[stderr]")
    assert said["3"].endswith("[machine-path]")
    assert said["4"] == "Cell outputs differ"
    assert said["6"] == "Cell execution caused an exception"
    assert said["7"].endswith("[picture-label]")
    assert done.returncode == 1


def test_the_command_checks_files_prints_json_and_has_three_exit_codes(lesson, tmp_path, capsys):
    target = str(ROOT / "sweeps" / "targets" / "one_fit.ipynb")
    assert main([target, "1"]) == 0
    assert capsys.readouterr().out == "2 notebooks, 0 findings\n"
    lesson.cells[3] = code("warn()", printed("UserWarning\n", "stderr"))
    nbformat.write(lesson, tmp_path / "01_lesson.ipynb")
    assert main([str(tmp_path / "01_lesson.ipynb"), target, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["notebooks"] == ["01_lesson.ipynb", "one_fit.ipynb"]
    assert [each["rule"] for each in found["findings"]] == ["registered", "stderr"]
    for wrong in (["77"], [str(tmp_path / "absent.ipynb")], [str(tmp_path)]):
        assert main(wrong) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_the_command_line_of_the_suite_says_the_same_with_the_same_exit_codes(
    lesson, tmp_path, capsys
):
    lesson.cells[3] = code("warn()", printed("UserWarning\n", "stderr"))
    nbformat.write(lesson, tmp_path / "01_lesson.ipynb")
    for arguments in (["01"], [str(tmp_path / "01_lesson.ipynb"), "--json"], ["77"]):
        ended = main(arguments), capsys.readouterr()
        assert (glm4v_nb.cli.main(["validate", *arguments]), capsys.readouterr()) == ended


def test_execute_refuses_a_notebook_that_lies_elsewhere_and_json(
    lesson, tmp_path, capsys, monkeypatch
):
    nbformat.write(lesson, tmp_path / "01_lesson.ipynb")
    monkeypatch.setattr(program, "check_notebook", lambda path, entry: [])
    assert main(["--execute", str(tmp_path / "01_lesson.ipynb")]) == 2
    assert "leave out --execute" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--execute", "--json", "01"])


def test_execute_runs_the_chosen_notebooks_with_nbval_and_only_if_the_rules_are_kept(
    monkeypatch, capsys
):
    called = []
    monkeypatch.setattr(
        subprocess, "call", lambda command, **options: called.append((command, options)) or 1
    )
    target = str(ROOT / "sweeps" / "targets" / "one_fit.ipynb")
    assert main(["--execute", "--workers", "4", "01", target]) == 1, (
        "pytest's failure is this command's"
    )
    ((command, options),) = called
    assert command[1:] == [
        *["-m", "pytest", "-n", "2", "--dist", "loadfile"],
        *["notebooks/01_will_it_fit.ipynb", "sweeps/targets/one_fit.ipynb"],
    ]
    assert options["cwd"] == ROOT and options["env"]["HF_HUB_OFFLINE"] == "1"
    monkeypatch.setattr(program, "validate", lambda notebooks: ([], ["a finding"]))
    assert main(["--execute"]) == 1
    assert len(called) == 1


def test_without_nb_clean_the_command_fails_and_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert main(["01"]) == 1
    assert "pip install" in capsys.readouterr().err


# A stand-in never changes the code path: what tests run is what readers run.


def test_the_package_does_not_ask_who_runs_it_except_to_choose_how_progress_is_shown():
    asking = {}
    for path in [
        each for room in ("glm4v_nb", "nbsweep", "simgpu") for each in (ROOT / room).rglob("*.py")
    ]:
        if found := asks_for_its_runner(ast.parse(path.read_text(encoding="utf-8"))):
            asking[path.relative_to(ROOT).as_posix()] = found
    assert asking == {"nbsweep/display.py": ["for the variable CI"]}


def test_lint_pre_commit_and_the_rules_clean_notebooks_with_the_same_options():
    options = " ".join(NB_CLEAN_OPTIONS)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"nb-clean check {options} notebooks sweeps/targets" in makefile
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    entries = {
        hook["id"]: hook["entry"] for repository in config["repos"] for hook in repository["hooks"]
    }
    assert entries["nb-clean"] == f"nb-clean clean {options}"


def test_the_guide_for_contributors_lists_every_rule_and_each_has_a_notebook_here_that_breaks_it():
    table = (
        (ROOT / "CONTRIBUTING.md")
        .read_text(encoding="utf-8")
        .partition("| rule |")[2]
        .partition("\n\n")[0]
    )
    listed = {
        name for row in table.splitlines()[2:] for name in row.split("|")[1].strip().split(", ")
    }
    broken = (
        {rule for rule, *_ in BAD_CELLS.values()}
        | {rule for _, rule, *_ in BAD_NOTEBOOKS}
        | {"format"}
        | {"reading-time", "prose-figure", "prose-mark"}  # tested beside the others
    )
    assert listed == broken
    rules = ROOT / "tools" / "notebook_rules"
    sources = [rules / name for name in ("stored.py", "outputs.py", "prose.py", "shape.py")]
    rule = r'(?:yield \(?|return |append\(\(|Finding\(path.name, "",)\s*"([a-z-]+)",'
    given = re.findall(rule, "".join(map(Path.read_text, sources)))
    assert set(given) == listed


def test_the_registry_is_checked_as_a_whole_when_nothing_is_named():
    paths, findings = validate()
    stored = [*(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "sweeps" / "targets").glob("*.ipynb")]
    assert sorted(paths) == sorted(stored)
    assert findings == []
    assert RUNNER_VARIABLES >= {"CI", "GITHUB_ACTIONS"}
