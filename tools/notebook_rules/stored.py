"""The rules for a stored notebook. ``check_notebook`` applies them, with those of ``outputs``,
and runs nothing.

What no rule can see: the words inside a picture's pixels (instead the cell must show where they
come from, and tests/test_plots.py that the plots write them), and whether a label is true.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from nbsweep.parameters import ParameterError, parse_notebook
from nbsweep.registry import NotebookEntry

from .machine_traces import find_machine_traces
from .outputs import Problem, cell_tree, check_outputs, check_printed_figures
from .prose import check_prose
from .shape import check_cell, check_lesson

# The suite's largest has 285 KB. A page of this size still opens at once, and its changes can be
# reviewed.
MAX_BYTES = 300_000

# The Makefile and .pre-commit-config.yaml have the same. Outputs are part of a lesson, and so are
# its cells' tags. They also take away what JupyterLab writes down as soon as a notebook is opened,
# such as the version of Python: here it breaks no rule.
NB_CLEAN_OPTIONS = (
    "--preserve-cell-outputs",
    "--preserve-execution-counts",
    "--preserve-cell-metadata-field",
    "tags",
)
_METADATA = {"kernelspec", "language_info"}

# What tells a program that it runs in continuous integration, or under a test.
RUNNER_VARIABLES = frozenset(
    "APPVEYOR BUILDKITE CI CIRCLECI CONTINUOUS_INTEGRATION GITHUB_ACTIONS GITLAB_CI JENKINS_URL"
    " PYTEST_CURRENT_TEST PYTEST_VERSION PYTEST_XDIST_WORKER TF_BUILD TRAVIS".split()
)
RUNNERS = frozenset({"nbval", "papermill", "pytest"})


@dataclass(frozen=True)
class Finding:
    """One rule, broken in one place.

    Attributes:
        notebook: file name.
        where: "code cell 3", "text cell 2", each kind counted from 1; "" for the notebook as a
            whole.
        rule: its name, as in the README's table.
        problem: what was wrong.
        advice: what to do.
    """

    notebook: str
    where: str
    rule: str
    problem: str
    advice: str

    def __str__(self) -> str:
        place = f"{self.notebook}, {self.where}" if self.where else self.notebook
        return f"{place}: {self.problem}. {self.advice} [{self.rule}]"

    def to_dict(self) -> dict[str, str]:
        """The attributes by name."""
        return asdict(self)


def check_notebook(path: Path, entry: NotebookEntry | None) -> list[Finding]:
    """Every rule that a stored notebook breaks, the notebook as a whole first, then cell by cell.

    Args:
        path: the notebook's file.
        entry: the notebook's in the registry; None if it has none.

    Raises:
        OSError: the file cannot be read.
        RuntimeError: nb-clean is not installed.
    """
    content = path.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about ids, which are findings below
            notebook = nbformat.reads(content.decode(), as_version=4)
            nbformat.validate(notebook)
    except (
        Exception
    ) as error:  # Before it validates, nbformat takes for granted what it is to validate.
        reason = str(error).partition("\n")[0] or type(error).__name__
        problem = f"this is not a valid notebook: {reason}"
        advice = "Restore it from the last commit, or save it in Jupyter again."
        return [Finding(path.name, "", "format", problem, advice)]
    findings = [Finding(path.name, "", *problem) for problem in _check_whole(path, notebook, entry)]
    # As they are stored: to the others nbformat has given ids.
    ids = [cell.get("id") for cell in json.loads(content)["cells"]]
    prose = check_prose(notebook)
    findings += [Finding(path.name, "", *problem) for problem in check_lesson(notebook, entry)]
    for number, (where, cell, context) in enumerate(_cells(notebook)):
        problems = [*_check_id(ids, number), *_check_source(cell), *prose.get(number, ())]
        problems += check_cell(cell)
        if cell.cell_type == "code":
            problems += check_outputs(cell, cell.outputs)
            problems += check_printed_figures(cell.outputs, context)
        findings += [Finding(path.name, where, *problem) for problem in problems]
    return findings


def _cells(notebook: NotebookNode) -> Iterator[tuple[str, NotebookNode, str]]:
    """Every cell, with its name in findings, and the text that can speak for its figures: the
    opening, its section."""
    numbers = {"code": 0, "markdown": 0, "raw": 0}
    opening = section = ""
    for cell in notebook.cells:
        numbers[cell.cell_type] += 1
        if cell.cell_type == "markdown":
            opening = opening or cell.source
            section += f"\n{cell.source}"
            section = section[max(0, section.rfind("\n## ")) :]
        kind = "text" if cell.cell_type == "markdown" else cell.cell_type
        yield f"{kind} cell {numbers[cell.cell_type]}", cell, opening + section


# The notebook as a whole.


def _check_whole(
    path: Path, notebook: NotebookNode, entry: NotebookEntry | None
) -> Iterator[Problem]:
    size = path.stat().st_size
    if size > MAX_BYTES:
        problem = f"the file has {size:,} bytes; expected at most {MAX_BYTES:,}"
        yield "size", problem, "Draw fewer or smaller pictures, or print less."
    yield from _check_registered(notebook, entry)
    try:
        unused = parse_notebook(path).out_of_reach
    except ParameterError as error:
        problem, _, advice = (
            str(error).replace(f"{path} ", "it ").replace(f"{path}: ", "").partition("; ")
        )
        yield "parameters", problem, _as_sentence(advice)
    else:
        for name, reason in unused.items():
            problem, _, advice = reason.partition("; ")
            yield "parameters", f"setting {name} changes nothing: {problem}", _as_sentence(advice)
    yield from _check_metadata(path, notebook)
    if not any(cell.get("outputs") for cell in notebook.cells):
        problem = "no cell has a stored output; expected those of a real run"
        yield "outputs", problem, f"Run `python tools/refresh_notebooks.py {path.name[:2]}`."


def _check_registered(notebook: NotebookNode, entry: NotebookEntry | None) -> Iterator[Problem]:
    if entry is None:
        yield "registered", "registry.toml does not list it", "Add a [[notebook]] entry."
        return
    heading = notebook.cells[0].source.partition("\n")[0] if notebook.cells else ""
    number = f"{entry.number} · " if entry.number.isdecimal() else ""
    expected = f"# {number}{entry.title}"
    if heading != expected:
        problem = f"it begins with {heading!r}; expected {expected!r}, as in registry.toml"
        yield "registered", problem, "Make the two agree."


def _check_metadata(path: Path, notebook: NotebookNode) -> Iterator[Problem]:
    kernel = notebook.metadata.get("kernelspec", {}).get("name")
    if kernel != "python3":
        problem = f"its kernel is {kernel!r}; expected 'python3', which every environment has"
        yield "kernelspec", problem, "Choose the kernel Python 3 and save."
    if extra := sorted(notebook.metadata.keys() - _METADATA):
        problem = (
            f"its metadata has {', '.join(extra)}; expected {' and '.join(sorted(_METADATA))} only"
        )
        yield "metadata", problem, "Remove the rest, as tools/refresh_notebooks.py does."
    # nb-clean has a command and no library.
    command = Path(sys.executable).with_name("nb-clean")
    try:
        done = subprocess.run(
            [command, "check", "--preserve-notebook-metadata", *NB_CLEAN_OPTIONS, path],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise RuntimeError(
            "nb-clean is not installed beside this Python; it checks the notebooks' metadata. "
            "Install it: python -m pip install -e '.[dev]'"
        ) from None
    if done.returncode:
        said = [line.removeprefix(f"{path} ") for line in (done.stdout + done.stderr).splitlines()]
        problem = f"nb-clean, which counts cells from 0, finds {'; '.join(said)}"
        yield "metadata", problem, f"Run `nb-clean clean {' '.join(NB_CLEAN_OPTIONS)}` on it."


# What is written in a cell.


def _check_id(ids: list[str | None], number: int) -> Iterator[Problem]:
    advice = "Open it in JupyterLab, which gives cells ids of their own, and save it."
    if ids[number] is None:
        yield "format", "it has no id; every cell has one since format 4.5", advice
    elif ids[number] in ids[:number]:
        yield "format", f"it has the id {ids[number]!r} of a cell before it", advice


def _check_source(cell: NotebookNode) -> Iterator[Problem]:
    if found := find_machine_traces(cell.source):
        problem = f"it names {', '.join(found)}, which one machine has"
        yield "machine-path", problem, "Use a relative path, or a temporary folder."
    if cell.cell_type != "code":
        return
    tags = set(cell.metadata.get("tags", []))
    if "raises-exception" in tags or re.search(
        r"(?m)^\s*#\s*NBVAL_RAISES_EXCEPTION\s*$", cell.source
    ):
        problem = "it is to end with an error, which nbval accepts and papermill does not"
        yield "error", problem, "Catch the exception in the cell."
    if "nbval-skip" in tags or re.search(r"(?m)^\s*#\s*NBVAL_SKIP\s*$", cell.source):
        problem = "the tests are to skip it, so that they would prove another notebook"
        yield (
            "same-code",
            problem,
            "Let it run everywhere; what may differ is the value of a parameter.",
        )
    for reason in asks_for_its_runner(cell_tree(cell)):
        problem = f"it asks {reason}, so that the tests would prove other code than a reader runs"
        yield "same-code", problem, "What may differ is the value of a parameter: read that."


def asks_for_its_runner(tree: ast.AST) -> list[str]:
    """Where code could tell a test, or continuous integration, from a reader: its words, in the
    code's order.

    Found are the names of ``RUNNER_VARIABLES`` as texts, and ``"pytest" in sys.modules``. Names put
    together at run time are not found.
    """
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in RUNNER_VARIABLES:
            found.append(f"for the variable {node.value}")
        if (
            isinstance(node, ast.Compare)
            and isinstance(node.left, ast.Constant)
            and node.left.value in RUNNERS
        ):
            if any(
                isinstance(right, ast.Attribute) and right.attr == "modules"
                for right in node.comparators
            ):
                found.append(f"whether {node.left.value} is loaded")
    return found


def _as_sentence(text: str) -> str:
    return (
        f"{text[:1].upper()}{text[1:]}." if text else "See notebooks/registry.toml and notebook 15."
    )
