"""``record``: a notebook leaves a figure for whoever reruns it."""

import math
import os
from pathlib import Path

from .store import Record, Scalar
from .words import in_words

# Set for the kernel by whoever runs the notebook; without it a figure is only shown.
RECORDS_VARIABLE = "NBSWEEP_RECORDS"
LABELS = ("simulated", "measured", "cited", "arithmetic")


def record(name: str, value: Scalar, unit: str = "", label: str = "simulated") -> Record:
    """Show a figure, and keep it beside the notebook when that is run by ``nbsweep``.

    Args:
        name: what it is, for example "peak on card 0".
        value: a number, a text, or True or False. Memory is in bytes, with ``unit`` "bytes".
        label: where it comes from: "simulated", "measured on ...", "cited ..." or "arithmetic"; a
            rig's ``provenance`` is one.

    Raises:
        TypeError, ValueError: a name, value or label of another kind.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"name is {name!r}; expected a few words that say what the figure is.")
    if not isinstance(value, bool | int | float | str):
        raise TypeError(
            f"{name} is a {type(value).__name__}; expected a number, a text, or True or False. Take"
            " .item() of a tensor of one element, or record its parts one by one."
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"{name} is {value}; expected a finite number. Record the reason as a text instead."
        )
    if not label.startswith(LABELS):
        raise ValueError(
            f"label is {label!r}; expected it to begin with one of {', '.join(LABELS)}."
        )
    figure = Record(name=name, value=value, unit=unit, label=label)
    print(f"{name}: {in_words(value, unit)}  ({label})")
    if path := os.environ.get(RECORDS_VARIABLE):
        # One write a line: whole if the process is killed.
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(figure.model_dump_json() + "\n")
    return figure
