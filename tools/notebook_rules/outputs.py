"""The rules for what a cell has put out: stored in its notebook, or just now, while nbval executes
it."""

from __future__ import annotations

import ast
import base64
import io
import json
import re
from collections.abc import Iterator, Sequence

from nbformat import NotebookNode
from PIL import Image

from nbsweep.reads import parse_cell
from nbsweep.records import LABELS

from .machine_traces import find_machine_traces

# Tags of cells, beside papermill's "parameters" and nbval's own.
STDERR_TAG = "writes-stderr"
ILLUSTRATION_TAG = "illustration"

# "computed": by the cell itself, from nothing but its own numbers.
PICTURE_LABELS = (*LABELS, "computed")
_PRINTED_FIGURE = re.compile(r"\d ?(?:[KMGT]i?B|bytes|tokens/s)\b")
_RECORDED_FIGURE = re.compile(rf"\((?:{'|'.join(LABELS)})[^\n]*\)$", re.MULTILINE)

Problem = tuple[str, str, str]  # rule, problem, advice


def check_outputs(cell: NotebookNode, outputs: Sequence[NotebookNode]) -> list[Problem]:
    """The rules for what a code cell has put out, stored or just now: (rule, problem, advice) for
    each one broken."""
    return [
        *_check_errors(outputs),
        *_check_stderr(cell, outputs),
        *_check_traces(outputs),
        *_check_readable(outputs),
        *_check_pictures(cell, outputs),
        *_check_records(cell, outputs),
    ]


def cell_tree(cell: NotebookNode) -> ast.Module:
    """The cell's code as a tree; an empty one where it is no Python, which the run will say."""
    try:
        return parse_cell(cell.source)
    except SyntaxError:
        return ast.Module([], [])


def _check_errors(outputs: Sequence[NotebookNode]) -> Iterator[Problem]:
    for output in outputs:
        if output.output_type == "error":
            yield (
                "error",
                f"it ended with {output.ename}",
                "Mend it, or catch the exception in the cell.",
            )


def _check_stderr(cell: NotebookNode, outputs: Sequence[NotebookNode]) -> Iterator[Problem]:
    written = "".join(output.text for output in outputs if output.get("name") == "stderr").strip()
    if written and STDERR_TAG not in cell.metadata.get("tags", []):
        problem = f"it wrote {written.splitlines()[0][:100]!r} to stderr"
        yield (
            "stderr",
            problem,
            f"Mend what it warns of; if that is the lesson, tag the cell {STDERR_TAG}.",
        )


def _check_traces(outputs: Sequence[NotebookNode]) -> Iterator[Problem]:
    found = sorted(
        {
            trace
            for output in outputs
            for text in _texts(output)
            for trace in find_machine_traces(text)
        }
    )
    if found:
        problem = f"its output names {', '.join(found)}, which tells of the machine it ran on"
        yield (
            "machine-path",
            problem,
            "Print the name of the file, or a path relative to the notebook.",
        )


def _check_readable(outputs: Sequence[NotebookNode]) -> Iterator[Problem]:
    for output in outputs:
        for kind in output.get("data", {}):
            if _is_bitmap(kind) and _picture_texts(output.data[kind]) is None:
                problem = f"its output of kind {kind} is no picture that can be read"
                yield "format", problem, "Run the notebook again and save it."


def _check_pictures(cell: NotebookNode, outputs: Sequence[NotebookNode]) -> Iterator[Problem]:
    pictures = [
        output for output in outputs if any(_is_picture(kind) for kind in output.get("data", {}))
    ]
    if not pictures or ILLUSTRATION_TAG in cell.metadata.get("tags", []):
        return
    said = "\n".join(_printed(outputs) + [json.dumps(picture.metadata) for picture in pictures])
    if any(label in said for label in PICTURE_LABELS) or _source_gives_label(cell_tree(cell)):
        return
    advice = (
        "Write the rig's provenance into it; if it shows no figures, tag the cell"
        f" {ILLUSTRATION_TAG}."
    )
    yield "picture-label", "nothing in it says where the figures of its picture come from", advice


def _source_gives_label(tree: ast.Module) -> bool:
    """Whether code names a label, passes on a ``provenance``, or calls a plot of this package,
    which writes it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if any(label in node.value for label in PICTURE_LABELS):
                return True
        if isinstance(node, ast.Attribute) and node.attr == "provenance":
            return True
        if isinstance(node, ast.Call) and getattr(node.func, "id", "").startswith("plot_"):
            return True
    return False


def _check_records(cell: NotebookNode, outputs: Sequence[NotebookNode]) -> Iterator[Problem]:
    calls = [node for node in ast.walk(cell_tree(cell)) if isinstance(node, ast.Call)]
    if any(getattr(call.func, "id", "") == "record" for call in calls):
        if not _RECORDED_FIGURE.search("\n".join(_printed(outputs))):
            problem = (
                f"it records figures, and its output labels none as {', '.join(LABELS[:-1])} or"
                f" {LABELS[-1]}"
            )
            yield "record-label", problem, "Let `record` print them; run the notebook again."


def check_printed_figures(outputs: Sequence[NotebookNode], context: str) -> Iterator[Problem]:
    """The rule for printed figures of memory and speed: something says where they come from.

    Args:
        context: the text that may say it instead of the output: the notebook's opening, and the
            section so far.
    """
    printed = "\n".join(_printed(outputs))
    if figure := _PRINTED_FIGURE.search(printed):
        if not any(label in printed + context for label in LABELS):
            line = next(line for line in printed.splitlines() if figure.group() in line).strip()
            problem = (
                f"nothing says where {line[:60]!r} comes from, neither its output nor its section"
                " nor the opening"
            )
            yield (
                "figure-label",
                problem,
                f"Print {', '.join(LABELS[:-1])} or {LABELS[-1]} beside it.",
            )


def _is_picture(kind: str) -> bool:
    return kind.startswith("image/")


def _is_bitmap(kind: str) -> bool:
    return _is_picture(kind) and not kind.endswith("xml")


def _picture_texts(content: str) -> list[str] | None:
    """The texts in a picture's file; None where it is none, or so large that it is a trap."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            image.load()
            return [str(value) for value in (*image.info.values(), *image.getexif().values())]
    except Exception:  # whatever Pillow finds wrong, it is the notebook's matter
        return None


def _printed(outputs: Sequence[NotebookNode]) -> list[str]:
    """What a reader reads: printed text, and text and HTML that were shown."""
    texts = [output.text for output in outputs if output.output_type == "stream"]
    shown = [
        output.get("data", {}).get(kind)
        for output in outputs
        for kind in ("text/plain", "text/html")
    ]
    return texts + [text for text in shown if text]


def _texts(output: NotebookNode) -> Iterator[str]:
    """All text of an output, the text that pictures carry included."""
    if output.output_type == "stream":
        yield output.text
    elif output.output_type == "error":
        yield "\n".join([output.evalue, *output.traceback])
    for kind, content in output.get("data", {}).items():
        if _is_bitmap(kind):
            yield from _picture_texts(content) or ()
        else:
            yield content if isinstance(content, str) else json.dumps(content)
    yield json.dumps(output.get("metadata", {}))
