"""``record``: a notebook leaves a figure for whoever reruns it."""

import os
import sys
from pathlib import Path
from typing import Any

from .store import Record, Scalar
from .words import in_words, whole_characters

# Set for the kernel by whoever runs the notebook; without it a figure is only shown.
RECORDS_VARIABLE = "NBSWEEP_RECORDS"
LABELS = ("simulated", "measured", "cited", "arithmetic")


def record(name: str, value: Scalar, unit: str = "", label: str = "simulated") -> Record:
    """Show a figure, and keep it beside the notebook when that is run by ``nbsweep``.

    A name that is recorded again makes a series: the report shows its last value and says how many
    there are, runs.csv has them all.

    Args:
        name: what it is, for example "peak on card 0".
        value: a number, a text, or True or False; a NumPy scalar, or array of no dimension, is
            kept as its Python value. Memory is in bytes, with ``unit`` "bytes".
        label: where it comes from: "simulated", "measured on ...", "cited ..." or "arithmetic"; a
            rig's ``provenance`` is one.

    Raises:
        TypeError, ValueError: a name, value, unit or label of another kind.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"name is {name!r}; expected a few words that say what the figure is.")
    value = _python_value(value)
    if not isinstance(value, bool | int | float | str):
        raise TypeError(
            f"{name} is a {type(value).__name__}; expected a number, a text, or True or False. Take"
            " .item() of a tensor of one element, or record its parts one by one."
        )
    if not isinstance(value, str) and not abs(value) <= sys.float_info.max:
        shown = value if isinstance(value, float) else "beyond the largest float"
        raise ValueError(
            f"{name} is {shown}; expected a finite number. Record the reason as a text instead."
        )
    if not isinstance(unit, str):
        raise TypeError(f"unit of {name} is {unit!r}; expected a text such as 'bytes' or ''.")
    if not isinstance(label, str) or not label.startswith(LABELS):
        raise ValueError(
            f"label is {label!r}; expected it to begin with one of {', '.join(LABELS)}."
        )
    name, value, unit, label = map(whole_characters, (name, value, unit, label))
    figure = Record(name=name, value=value, unit=unit, label=label)
    print(f"{name}: {in_words(value, unit)}  ({label})")
    if path := os.environ.get(RECORDS_VARIABLE):
        # One write a line: whole if the process is killed.
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(figure.model_dump_json() + "\n")
    return figure


def _python_value(value: Any) -> Any:
    """A NumPy scalar, or array of no dimension, as Python has it; a kind of int or float as
    that; anything else as it is."""
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        # A long double's own item() is one again.
        return float(value) if value.dtype.kind == "f" else value.item()
    for kind in (int, float):
        if isinstance(value, kind) and not isinstance(value, bool):
            return kind(value)
    return value
