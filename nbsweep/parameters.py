"""A notebook's parameters: what they are, and whether a value given to one of them can reach the
code.

The parameters cell holds nothing but ``name = literal`` lines, so that papermill can put other
values below it. What papermill lets pass silently (an unknown name, another type, a value nothing
reads) is an error here, before the run.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import json
import re
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import nbformat
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from .reads import Reads
from .store import Value


class ParameterError(ValueError):
    """A parameters cell is not what it should be, or a value cannot be given to a parameter."""


@dataclass(frozen=True)
class ParsedNotebook:
    """A notebook's file name, its parameters with their defaults, and the code cells after the
    parameters cell.

    Code cells are counted from 1, as ``Outcome.failed_cell`` does.
    """

    file: str
    parameters: dict[str, Value]
    later_cells: tuple[tuple[int, str], ...]

    @cached_property
    def out_of_reach(self) -> dict[str, str]:
        """For every parameter whose value cannot reach the code: why, as the end of a sentence.

        Raises ParameterError for a cell that is not Python even after IPython's own rewriting of
        magics.
        """
        reads = Reads(self.parameters)
        for number, source in self.later_cells:
            try:
                reads.follow(source, number)
            except SyntaxError as error:
                raise ParameterError(
                    f"{self.file}: code cell {number} is not valid Python ({error.msg}, line"
                    f" {error.lineno}); correct it, or write a magic with its %"
                ) from None
        return {
            name: f"code cell {reads.rebound[name]} gives the name another value before anything"
            " reads it; use another name there"
            if name in reads.rebound
            else "nothing reads it; read it in a later cell or remove it"
            for name in self.parameters.keys() - reads.read
        }


def parse_notebook(path: Path | str) -> ParsedNotebook:
    """Read a notebook, its parameters with their defaults in the order of their cell.

    Raises:
        ParameterError: the file is no notebook, it has no parameters cell or several, or that cell
            holds anything but ``name = literal`` lines (bool, int, finite float, str, or a list of
            one of int, float and str).
    """
    path = Path(path)
    cells = _read_cells(path)
    tags = [cell["metadata"].get("tags", []) for cell in cells]
    if any("injected-parameters" in each for each in tags):
        raise ParameterError(
            f"{path} is an executed copy, with injected parameters; name the notebook it came from"
        )
    tagged = [cell for cell, each in zip(cells, tags, strict=True) if "parameters" in each]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    if len(tagged) != 1 or tagged[0] not in code:
        found = "a cell that is no code" if len(tagged) == 1 else f"{len(tagged) or 'none'} of them"
        raise ParameterError(
            f'{path} needs exactly one code cell tagged "parameters", but has {found}; '
            "put the tag on the one cell of name = literal lines"
        )
    position = next(index for index, cell in enumerate(code) if cell is tagged[0])
    sources = ["".join(cell["source"]) for cell in code]
    later = tuple(enumerate(sources, start=1))[position + 1 :]
    return ParsedNotebook(path.name, _read_assignments(sources[position], path), later)


def check_override(parsed: ParsedNotebook, name: str, value: Value) -> Value:
    """`value` as it is to be given to parameter `name`: an int for a float parameter becomes a
    float.

    The value reaches the code if some module-level path through the later cells reads the name
    before binding it; see ``Reads`` for what counts.

    Raises:
        ParameterError: there is no such parameter, the value has another type than the default, or
            it would never reach the code.
    """
    if name not in parsed.parameters:
        close = difflib.get_close_matches(str(name), parsed.parameters, n=1)
        guess = f"did you mean {close[0]}? It" if close else "it"
        raise ParameterError(
            f"{parsed.file} has no parameter {name}; {guess} has"
            f" {', '.join(parsed.parameters) or 'none'}"
        )
    default = parsed.parameters[name]
    try:
        converted = _converted(value, default)
    except TypeError:
        raise ParameterError(
            f"{value!r} is {_described(value)}; expected {_described(default)}, as the default of"
            f" {name} in {parsed.file} is ({default!r})"
        ) from None
    if name in parsed.out_of_reach:
        raise ParameterError(
            f"parameter {name} of {parsed.file} cannot be set to any effect:"
            f" {parsed.out_of_reach[name]}"
        )
    return converted


def parse_value(text: str, default: Value) -> Value:
    """Text from the command line as a value of the default's type.

    A bool is true or false, a list is JSON, a str is taken as it stands.

    Raises ParameterError for text that is no such value; the caller names the parameter.
    """
    try:
        if isinstance(default, str):
            return _converted(text, default)
        if isinstance(default, bool):
            return {"true": True, "True": True, "false": False, "False": False}[text]
        if isinstance(default, list):
            return _converted(json.loads(text), default)
        # Neither 1_000 nor digits of other scripts nor a word.
        if not re.fullmatch(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?", text):
            raise ValueError(text)
        return _converted(ast.literal_eval(text), default)
    except (KeyError, SyntaxError, TypeError, ValueError, RecursionError):
        wanted = {
            bool: "true or false",
            int: "a whole number such as 12",
            float: "a finite number such as 0.5",
            str: "whole characters",
        }.get(type(default), f"{_described(default)} in JSON, such as {json.dumps(default)}")
        raise ParameterError(
            f"{text!r} cannot be read as {_described(default)}; write {wanted}"
        ) from None


def _read_cells(path: Path) -> list[dict]:
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ParameterError(
            f"{path} cannot be read ({error.strerror}); expected a notebook"
        ) from None
    except (ValueError, RecursionError):
        raise ParameterError(f"{path} is not JSON, as a notebook is; name an .ipynb file") from None
    if not isinstance(notebook, dict) or notebook.get("nbformat") != 4 or "cells" not in notebook:
        raise ParameterError(
            f"{path} is not a notebook of format 4; open it in Jupyter and save it there"
        )
    try:
        with warnings.catch_warnings():
            # A cell without an id is complained about; it does not matter here.
            warnings.simplefilter("ignore")
            nbformat.validate(notebook)
    except Exception as error:
        # Before it validates nbformat repairs, and takes for granted there what it is to validate.
        problem = str(error).partition("\n")[0] or type(error).__name__
        raise ParameterError(
            f"{path} is not a valid notebook: {problem}; save it in Jupyter again"
        ) from None
    return notebook["cells"]


def _read_assignments(source: str, path: Path) -> dict[str, Value]:
    parameters: dict[str, Value] = {}
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise ParameterError(
            f"{path}: the parameters cell is not valid Python ({error.msg}, line {error.lineno}); "
            "expected only name = literal lines"
        ) from None
    for statement in statements:
        try:
            # AttributeError for another statement, ValueError for a = b = 1
            (target,) = statement.targets
            name, value = target.id, ast.literal_eval(statement.value)
            _converted(value, value)
        except (AttributeError, TypeError, ValueError):
            raise ParameterError(
                f"{path}: line {statement.lineno} of the parameters cell is"
                f" {ast.unparse(statement)!r}; expected name = a plain bool, int, finite float,"
                " str, or list of one of the last three; move it to another cell"
            ) from None
        if name in parameters:
            raise ParameterError(
                f"{path} assigns {name} twice in its parameters cell; remove one of the lines"
            )
        parameters[name] = value
    return parameters


# What a parameter can be, in the order in which a value's own kind is found: every int would do for
# a float, too. Strict: to Python True is an int, and "1" would do for 1.
_FLOAT = Annotated[float, Field(allow_inf_nan=False)]
_TEXT = Annotated[str, AfterValidator(lambda text: text.encode().decode())]  # no half characters
_KINDS = {
    name: TypeAdapter(kind, config=ConfigDict(strict=True))
    for name, kind in {
        "a bool": bool,
        "an int": int,
        "a float": _FLOAT,
        "a str": _TEXT,
        "a list of int": list[int],
        "a list of float": list[_FLOAT],
        "a list of str": list[_TEXT],
    }.items()
}


def _converted(value: Value, default: Value) -> Value:
    """`value` in the default's type. Raises TypeError for another type, and for a float that is not
    finite."""
    lists = [name for name in _KINDS if name.startswith("a list")]
    for name in lists if default == [] else filter(None, [_kind(default)]):
        with contextlib.suppress(ValidationError):
            return _KINDS[name].validate_python(value)
    raise TypeError


def _kind(value: Value) -> str | None:
    for name, kind in _KINDS.items():
        with contextlib.suppress(ValidationError):
            kind.validate_python(value)
            return name
    return None


def _described(value: Value) -> str:
    if kind := _kind(value):
        return kind
    if isinstance(value, list):
        return "a list of other things than one of int, float and str"
    if isinstance(value, str):
        return "no text, for it has half of a character"
    return "no finite float" if isinstance(value, float) else f"a {type(value).__name__}"
