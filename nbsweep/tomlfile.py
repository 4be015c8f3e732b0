"""Reads a TOML file as a model of pydantic; whatever is wrong with it is one sentence."""

from __future__ import annotations

import difflib
import reprlib
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)

_EXPECTED = {
    "dict_type": "a table of names",
    "finite_number": "a positive number",
    "float_type": "a positive number",
    "greater_than": "a positive number",
    "list_type": "a list such as [first, second]",
    "literal_error": "core or extra",
    "model_type": 'a table such as [[runs]] with notebook = "01"',
    "string_pattern_mismatch": "only a-z, 0-9, _ and -",
    "string_too_short": "some text",
    "string_type": "text",
    "string_unicode": "whole characters",
    "too_short": "at least one element",
}


def read_toml(
    path: Path, model: type[Model], entry: type[BaseModel], what: str, **more: Any
) -> Model:
    """A file as ``model`` has it.

    Args:
        entry: the model of the tables inside; its keys are named where one is misspelt.
        what: the file as errors call it, such as "a sweep file".
        more: values of keys that the file need not have.

    Raises:
        ValueError: the file cannot be read or is not right; names file and key.
    """
    try:
        return model.model_validate(more | tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        problem = _first_problem(error, model, entry)
    except OSError as error:
        problem = f"cannot be read ({error.strerror}); expected {what} in TOML"
    except UnicodeDecodeError:
        problem = "not text in UTF-8; save it as that"
    except RecursionError:
        problem = "nested too deeply; expected a few levels"
    except ValueError as error:  # a number of thousands of digits, beside TOML's own
        problem = f"not valid TOML: {error}; correct that line"
    raise ValueError(f"{path}: {problem}")


def _first_problem(error: ValidationError, model: type[BaseModel], entry: type[BaseModel]) -> str:
    # "run" is an unknown key and a missing "runs"; the first says more.
    problem = min(error.errors(), key=lambda problem: problem["type"] == "missing")
    *parent, last = problem["loc"]
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"])
    place = "".join(parts).lstrip(".")
    if problem["type"] == "extra_forbidden":
        fields = (entry if parent else model).model_fields.items()
        known = [field.alias or name for name, field in fields]
        close = difflib.get_close_matches(str(last), known, n=1)
        guess = f"did you mean {close[0]}? The keys" if close else "the keys"
        return f"{place}: unknown key; {guess} here are {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{place}: is missing; add it"
    found = reprlib.repr(problem["input"])
    if place == "name":
        found += " (the file's name where none is given)"
    expected = _EXPECTED.get(problem["type"], problem["msg"])
    return f"{place}: {found} is not accepted; expected {expected}; correct it"
