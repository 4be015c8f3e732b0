"""The rules for a lesson's shape: short texts and cells, pictures in words, what it takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from statistics import median

from nbformat import NotebookNode

from nbsweep.registry import NotebookEntry

from .outputs import Problem

# At the median. rasbt/LLMs-from-scratch, which reads well, has texts of 35 to 42 words.
MAX_WORDS = 60
MAX_CODE_LINES = 6
MAX_CHARACTERS = 100
WORDS_PER_MINUTE = 200

_NO_WORDS = re.compile(r"```.*?```|<!--.*?-->|(?<=\])\([^)]*\)|<[^>]*>", re.DOTALL)
_TAKES = re.compile(r"\*\*Takes\*\* about (\d+) minutes? to run, (\d+) to read")


def check_lesson(notebook: NotebookNode, entry: NotebookEntry | None) -> Iterator[Problem]:
    """The rules for a lesson as a whole; a notebook without a number is to be rerun, not read."""
    if entry and not entry.number.isdecimal():
        return
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    codes = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    words = median([_words(text) for text in texts] or [0])
    if words > MAX_WORDS:
        problem = f"its text cells have {words:g} words at the median; expected at most {MAX_WORDS}"
        yield "shape", problem, "Say less, or let the reader run something in between."
    lines = median([sum(map(bool, code.splitlines())) for code in codes] or [0])
    if lines > MAX_CODE_LINES:
        expected = f"expected at most {MAX_CODE_LINES}"
        problem = f"its code cells have {lines:g} lines at the median; {expected}"
        yield "shape", problem, "Move what is not the lesson into the package."
    if entry and entry.reading_minutes:
        yield from _check_times(texts, codes, entry)


def _check_times(texts: list[str], codes: list[str], entry: NotebookEntry) -> Iterator[Problem]:
    counted = sum(map(_words, texts)) + sum(len(code.split()) for code in codes)
    minutes = counted / WORDS_PER_MINUTE
    if abs(entry.reading_minutes - minutes) > 1 + minutes / 5:
        problem = f"registry.toml says {entry.reading_minutes} minutes to read; it has {counted}"
        advice = f"Write reading_minutes = {max(1, round(minutes))}."
        yield "reading-time", f"{problem} words, {WORDS_PER_MINUTE} a minute", advice
    expected = (str(max(1, round(entry.minutes))), str(entry.reading_minutes))
    found = _TAKES.search(texts[0] if texts else "")
    if found is None or found.groups() != expected:
        said = f"**Takes** about {expected[0]} minutes to run, {expected[1]} to read"
        problem = f"its opening does not say {said!r}, as registry.toml has it"
        yield "reading-time", problem, "Make the two agree."


def check_cell(cell: NotebookNode) -> Iterator[Problem]:
    """The rules for one cell."""
    if cell.cell_type == "markdown":
        for alternative in re.findall(r"!\[([^\]]*)\]\(", cell.source):
            if not alternative.strip():
                yield _without_alternative("its picture", "![what it shows](...)")
        for tag in re.findall(r"<img\b[^>]*>", cell.source):
            if not re.search(r"""\balt=["'][^"']+""", tag):
                yield _without_alternative("its picture", '<img alt="what it shows" ...>')
    if cell.cell_type != "code":
        return
    for line in cell.source.splitlines():
        if len(line) > MAX_CHARACTERS:
            problem = f"{line.strip()[:40]!r}... has {len(line)} characters"
            yield "shape", f"{problem}; expected at most {MAX_CHARACTERS} a line", "Break the line."
    if re.search(r"(?m)^\s*#\s*NBVAL_CHECK_OUTPUT\s*$", cell.source):
        problem = "it has the comment NBVAL_CHECK_OUTPUT, which is no part of a lesson"
        yield "shape", problem, "Tag the cell nbval-check-output."
    if re.search(r"(?m)^\s*assert\b", cell.source):
        problem = "it asserts something, which is no part of a lesson"
        yield "shape", problem, "Let the function that is called next say what it expected."
    for output in cell.outputs:
        for kind in output.get("data", {}):
            if kind.startswith("image/") and not output.metadata.get(kind, {}).get("alt"):
                yield _without_alternative(f"its output of kind {kind}", "describe(picture, ...)")


def _without_alternative(what: str, how: str) -> Problem:
    advice = f"Say in words what it shows: {how}; then run the notebook again."
    return "alternative-text", f"{what} has no alternative text", advice


def _words(text: str) -> int:
    return len(_NO_WORDS.sub(" ", text).split())
