"""The rule for prose: a figure in a text cell is one that the notebook shows, or says where it is
from.

A figure is looked for in the notebook's stored outputs and its code, at the digits that the prose
shows. Else its sentence says *cited*, or a mark in the same cell, which readers do not see,
accounts for it:

    <!-- cited: 10.3 GiB, the official model card -->
    <!-- arithmetic: 51.81 / 3 = 17.27 -->          evaluated; decimals are figures themselves
    <!-- measured: memory_h100.json, 333 MiB -->    looked for in benchmarks/results
    <!-- notebook 03: 2.93 GiB -->                  looked for in that notebook's outputs
    <!-- above: 22.03 GiB -->                       in a solution: in this notebook's outputs

A folded solution with code is run (``solutions``); what its text says is looked for in what it
prints.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from .figures import Figure, find_figures, is_among

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
LESSONS = ROOT / "notebooks"

# Below it, whole numbers without a unit are the language's: two cards, three ways.
_SMALL = 7
_FOLDED = re.compile(r"<details\b.*?</details>", re.DOTALL)
_CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
_COMMENT = re.compile(r"<!--\s*(.*?)\s*-->", re.DOTALL)
_MARK = re.compile(r"(cited|arithmetic|measured|above|notebook \d\d):\s*(.*)", re.DOTALL)
# What is no prose: code, addresses, headings, and the numbers of a list.
_NO_PROSE = re.compile(
    r"```.*?```|`[^`]*`|\*\*Takes\*\*[^.]*|(?<=\])\([^)]*\)|<[^>]*>|^#+ [^\n]*|^ *\d+\. ",
    re.DOTALL | re.MULTILINE,
)
_SENTENCES = re.compile(r"(?<=[.?!:])\s+|\n")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}

Problem = tuple[str, str, str]  # rule, problem, advice
_ADVICE = (
    "Say what the notebook shows, or account for the figure with a mark beside it, as"
    " CONTRIBUTING.md explains."
)


def check_prose(notebook: NotebookNode) -> dict[int, list[Problem]]:
    """What is wrong with the figures in a notebook's text cells, by the cell's place."""
    shown = figures_shown(notebook)
    found = {}
    for place, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            text = _FOLDED.sub(lambda part: "" if _CODE.search(part[0]) else part[0], cell.source)
            found[place] = list(check_text(text, shown, shown, "the notebook shows it nowhere"))
    return found


def figures_shown(notebook: NotebookNode) -> list[Figure]:
    """The figures of a notebook's code and stored outputs, pictures aside."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            found += find_figures(cell.source) + figures_printed(cell.outputs)
    return found


def figures_printed(outputs: Sequence[NotebookNode]) -> list[Figure]:
    """The figures of outputs: printed, shown as text, HTML or JSON."""
    texts = []
    for output in outputs:
        texts.append(output.get("text", ""))
        for kind, content in output.get("data", {}).items():
            if not kind.startswith("image/"):
                texts.append(str(content))
    return find_figures(_COLOURS.sub("", "\n".join(texts)))


def solutions(notebook: NotebookNode) -> list[tuple[str, str]]:
    """The folded solutions that have code, in order: (code, text)."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for folded in _FOLDED.findall(cell.source):
                if code := "\n".join(_CODE.findall(folded)):
                    found.append((code, folded))
    return found


def check_solution(
    text: str, outputs: Sequence[NotebookNode], shown: Sequence[Figure]
) -> list[Problem]:
    """Whether a solution's figures are among what it has just printed.

    Its code does not count: that eight and nine are tried does not say which of them fits.

    Args:
        shown: the notebook's figures, for marks.
    """
    printed = figures_printed(outputs)
    return list(check_text(text, printed, [*printed, *shown], "the solution does not print it"))


def check_text(
    text: str, pool: Sequence[Figure], known: Sequence[Figure], otherwise: str
) -> Iterator[Problem]:
    """The problems of a text's figures and marks.

    Args:
        pool: figures that need no mark.
        known: figures that a mark "above" or arithmetic may take up.
        otherwise: what to say of a figure that is in neither.
    """
    marked, problems = _read_marks(text, known)
    yield from problems
    prose = _NO_PROSE.sub(" ", _COMMENT.sub(" ", text))
    used = []
    for sentence in _SENTENCES.split(prose):
        for figure in find_figures(sentence):
            used.append(figure)
            is_small = not figure.unit and figure.digits <= 0 and figure.value < _SMALL
            if is_small or "cited" in sentence or is_among(figure, (*pool, *marked)):
                continue
            problem = f"it says {figure.text!r} in {sentence.strip()[:70]!r}, and {otherwise}"
            yield "prose-figure", problem, _ADVICE
    for body in _COMMENT.findall(text):
        figures = find_figures(body)
        taken = used + find_figures(" ".join(_COMMENT.findall(text)).replace(body, ""))
        if figures and not any(each.stands_for(one) for each in taken for one in figures):
            problem = f"its mark {body[:60]!r} accounts for no figure of the cell"
            yield "prose-mark", problem, "Remove it, or put it into the cell of its figure."


def _read_marks(text: str, known: Sequence[Figure]) -> tuple[list[Figure], list[Problem]]:
    """The figures that a text's marks account for, and what is wrong with the marks."""
    accounted: list[Figure] = []
    problems: list[Problem] = []
    for body in _COMMENT.findall(text):
        try:
            accounted += _read_mark(body, [*known, *accounted])
        except ValueError as error:
            problem, _, advice = str(error).partition("; ")
            problems.append(("prose-mark", f"its mark {body[:60]!r} {problem}", advice))
    return accounted, problems


def _read_mark(body: str, known: Sequence[Figure]) -> list[Figure]:
    match = _MARK.fullmatch(body)
    if match is None:
        raise ValueError(
            "is of no known kind; Begin it with cited:, arithmetic:, measured:, above: or"
            " notebook 03:, as CONTRIBUTING.md explains."
        )
    kind, content = match.groups()
    if kind == "arithmetic":
        accounted: list[Figure] = []
        for equation in content.split(";"):
            accounted += _calculate(equation, [*known, *accounted])
        return accounted
    if kind == "measured":
        file, _, content = content.partition(",")
        place, pool = f"benchmarks/results/{file}", _figures_of_result(file.strip())
    elif kind.startswith("notebook "):
        place, pool = kind, _figures_of_lesson(kind[-2:])
    else:
        place, pool = "this notebook", known
    figures = find_figures(content)
    source = re.sub("|".join(re.escape(figure.text) for figure in figures), "", content)
    if not figures or (kind == "cited" and not re.search(r"[A-Za-z]{3}", source)):
        raise ValueError("names no figure, or no source; Write both: cited: 10.3 GiB, model card.")
    if kind == "cited":
        return figures
    for figure in figures:
        if not is_among(figure, pool):
            raise ValueError(f"has {figure.text}, which {place} does not show; Look it up again.")
    return figures


def _calculate(equation: str, known: Sequence[Figure]) -> list[Figure]:
    """The figures of an equation, the result last; ValueError if it is wrong."""
    left, _, right = equation.partition("=")
    given, results = find_figures(left), find_figures(right)
    if len(results) != 1:
        raise ValueError("has no single result; Write it as 51.81 / 3 = 17.27.")
    try:
        value = _value(ast.parse(left.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        raise ValueError(
            "cannot be calculated; Use plain numbers, + - * / ** and brackets on the left."
        ) from None
    if abs(value - results[0].value) > results[0].tolerance:
        raise ValueError(f"is wrong: it makes {float(value):.6g}; Correct the figures.")
    for figure in given:
        if figure.digits > 0 and not is_among(figure, known):
            raise ValueError(
                f"calculates with {figure.text}, which this notebook does not show; Take a figure"
                " of an output, or account for it with a mark before this one."
            )
    return [*given, *results]


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) > 100:
            raise ValueError("the power is too large")
        return Fraction(_OPERATORS[type(node.op)](left, right))
    raise ValueError("not arithmetic")


@cache
def _figures_of_result(file: str) -> list[Figure]:
    path = RESULTS / Path(file).name
    if not path.is_file():
        raise ValueError(f"names {file!r}, which is not in benchmarks/results; Name a file there.")
    return find_figures(path.read_text(encoding="utf-8"))


@cache
def _figures_of_lesson(number: str) -> list[Figure]:
    path = next(LESSONS.glob(f"{number}_*.ipynb"), None)
    if path is None:
        raise ValueError(f"names notebook {number}, which there is not; Name one of the registry.")
    return figures_shown(nbformat.read(path, as_version=4))
