"""The rule for prose and folded solutions: notebooks that break it, and what is said about them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from notebook_rules import prose
from notebook_rules.figures import find_figures
from notebook_rules.prose import check_prose, check_solution, solutions

ROOT = Path(__file__).parents[2]


def printed(text):
    return new_output("stream", name="stdout", text=text)


def found(text, output="", source="1 + 1"):
    """What is found in a text cell behind a code cell with such an output."""
    code = new_code_cell(source, outputs=[printed(output)])
    return check_prose(new_notebook(cells=[code, new_markdown_cell(text)]))[1]


@pytest.mark.parametrize(
    ("prose", "output"),
    [
        ("A peak of 20.8 GiB.", "peak 20.81 GiB"),
        ("A peak of 20.8 GiB.", "22,334,668,801"),
        ("Half a GiB: 0.45 GiB.", "+ 462 MiB"),
        ("13.9 billion parameters.", "13,906,320,896 parameters"),
        ("It is 84 % of the model.", "84%"),
        ("It took 1.5 s.", "1500 ms"),
        ("Nine layers stay.", "{0: 9, 1: 31}"),
        ("51.8 of 44.07 GiB.", "51.81 GiB, 44.07 GiB"),
        ("Two cards, three ways, 5 of them.", "nothing"),
        ("Notebook 05 of 2026-11-25 on an RTX 5090, torch 2.11, issue #200, card 0.", "nothing"),
        ("[15 · Experiments](a), 16 bits.", "nothing"),
        ("`batch_size=18` and ```\n17.5 GiB\n``` are code.", "nothing"),
        ("It takes 10.3 GiB (*cited*: its card).", "nothing"),
    ],
)
def test_a_figure_that_the_notebook_shows_is_accepted_at_the_digits_of_the_prose(prose, output):
    assert found(prose, output) == []


@pytest.mark.parametrize(
    ("prose", "output", "says"),
    [
        ("A peak of 20.9 GiB.", "peak 20.81 GiB", "20.9 GiB"),
        ("A peak of 20.80 GiB.", "peak 20.81 GiB", "20.80 GiB"),
        ("A peak of 20.8 MiB.", "peak 20.81 GiB", "20.8 MiB"),
        ("Nine images fit.", "8 images fit", "Nine"),
        ("16 images fit.", "15.9 images", "16"),
        ("It is 85 % of the model.", "84%", "85 %"),
        ("## 17.5 in a heading\n\nand 17.6 GiB below it.", "nothing", "17.6 GiB"),
        ("<details>\n\nIt takes 3.5 GiB.\n\n</details>", "4 GiB", "3.5 GiB"),
    ],
)
def test_a_figure_that_the_notebook_does_not_show_is_named(prose, output, says):
    ((rule, problem, advice),) = found(prose, output)
    assert rule == "prose-figure" and "CONTRIBUTING.md" in advice
    assert f"it says {says!r} in" in problem and "nowhere" in problem


def test_a_figure_of_the_code_counts_and_one_of_another_text_cell_does_not():
    assert found("A batch of 18 images.", source="batch_size = 18") == []
    cells = [new_markdown_cell("It takes 7.5 GiB."), new_markdown_cell("As said: 7.5 GiB.")]
    assert [len(problems) for problems in check_prose(new_notebook(cells=cells)).values()] == [1, 1]


@pytest.mark.parametrize(
    "mark",
    [
        "cited: 17.27 GiB, the data sheet",
        "arithmetic: 51.81 / 3 = 17.27 GiB",
        "arithmetic: 51.81 / 3 = 17.3; 51.81 / 17.3 = 3; 51.81 / 3 = 17.27",
        "arithmetic: 2 * 51.81 = 103.62; 103.62 / 6 = 17.27",
        "measured: some.json, 17.27 GiB",
        "above: 17.27 GiB",
    ],
)
def test_a_mark_accounts_for_a_figure(mark, tmp_path, monkeypatch):
    monkeypatch.setattr(prose, "RESULTS", tmp_path)
    prose._figures_of_result.cache_clear()
    (tmp_path / "some.json").write_text('{"peak": 18543520563}')
    output = "17.27 GiB" if mark.startswith("above") else "51.81 GiB"
    assert found(f"It takes 17.27 GiB. <!-- {mark} -->", output) == []


@pytest.mark.parametrize(
    ("mark", "says"),
    [
        ("cited: 17.27 GiB", "no source"),
        ("cited: the data sheet", "names no figure"),
        ("arithmetic: 51.81 / 3 = 17.37 GiB", "is wrong: it makes 17.27"),
        ("arithmetic: 51.82 / 3 = 17.27 GiB", "calculates with 51.82"),
        ("arithmetic: len('17.27') = 17.27", "cannot be calculated"),
        ("arithmetic: 17.27", "no single result"),
        ("arithmetic: 9**9**9 = 17.27", "cannot be calculated"),
        ("measured: none.json, 17.27 GiB", "not in benchmarks/results"),
        ("measured: peers.json, 17.27001 GiB", "does not show"),
        ("above: 17.27 GiB", "does not show"),
        ("notebook 02: 17.27001 GiB", "does not show"),
        ("notebook 99: 17.27 GiB", "which there is not"),
        ("TODO 17.27 GiB", "of no known kind"),
    ],
)
def test_a_mark_that_is_wrong_is_named(mark, says):
    problems = found(f"It takes 17.27 GiB. <!-- {mark} -->", "51.81 GiB")
    assert problems[0][0] == "prose-mark"
    assert says in problems[0][1] and problems[0][2]


def test_a_mark_that_accounts_for_nothing_is_named():
    ((rule, problem, _),) = found("All is well. <!-- cited: 17 GiB, a data sheet -->")
    assert rule == "prose-mark" and "accounts for no figure" in problem


SOLUTION = """<details><summary>Solution</summary>

```python
print(f"{largest} fit")
```

Eight fit, beside 22.03 GiB. <!-- above: 22.03 GiB -->

</details>"""


def test_a_solution_is_compared_with_what_it_prints_and_not_with_its_code():
    notebook = new_notebook(cells=[new_markdown_cell(SOLUTION)])
    ((code, text),) = solutions(notebook)
    assert code == 'print(f"{largest} fit")\n'
    shown = find_figures("22.03 GiB and 8")
    assert check_solution(text, [printed("8 fit")], shown) == []
    ((_, problem, _),) = check_solution(text, [printed("9 fit")], shown)
    assert "'Eight'" in problem and "the solution does not print it" in problem
    assert check_prose(notebook) == {0: []}, "the rule for stored notebooks leaves it alone"


def test_solutions_are_run_after_the_last_cell_and_a_wrong_one_fails(tmp_path):
    cells = [new_code_cell("largest = 8", execution_count=1), new_markdown_cell(SOLUTION)]
    wrong = SOLUTION.replace("Eight", "Nine").replace("largest", "largest + 0")
    cells += [new_markdown_cell(wrong), new_code_cell("kept = '22.03 GiB'", execution_count=2)]
    cells.append(new_markdown_cell(SOLUTION.replace("largest", "missing")))
    path = tmp_path / "01_lesson.ipynb"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, path)
    # This repository's settings and conftest.py, which a file elsewhere does not have by itself.
    options = ["-c", "pyproject.toml", "--rootdir", ".", "-p", "conftest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", *options, path],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    results = re.findall(r"(?m)^(PASSED|FAILED) \S*::(\w+ \d)", done.stdout)
    assert sorted(map(list, results)) == [
        ["FAILED", "Solution 2"],
        ["FAILED", "Solution 3"],
        ["PASSED", "Cell 0"],
        ["PASSED", "Cell 1"],
        ["PASSED", "Solution 1"],
    ], done.stdout
    assert "it says 'Nine'" in done.stdout and "name 'missing' is not defined" in done.stdout
