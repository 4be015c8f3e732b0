"""Figures and texts as people read them: bytes in the unit that suits them, no text endless."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

_SIZES = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def is_number(value: Any) -> bool:
    """Whether a value is a finite int or float; True and False are none."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # an int may be beyond every float


def unit_for(unit: str, values: Sequence[Any]) -> tuple[str, int]:
    """The unit to show bytes in and its size, from the largest of them; other units as they are."""
    numbers = [abs(value) for value in values if is_number(value)]
    if unit.lower() not in ("bytes", "byte", "b") or not numbers:
        return unit, 1
    return next((found for found in _SIZES if max(numbers) >= found[1]), (unit, 1))


def in_words(value: bool | int | float | str, unit: str) -> str:
    """A figure with its unit; bytes in MiB and GiB."""
    if isinstance(value, str | bool):
        return f"{value} {unit}".strip()
    name, size = unit_for(unit, [value]) if unit == "bytes" else (unit, 1)
    if size >= 2**20:
        return f"{value / size:.2f} {name}"
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    return f"{text} {unit}".strip()


def shortened(text: str, most: int, where: str) -> str:
    """A text without its middle if it has more than ``most`` characters, which it says then, and
    where all of it is."""
    if len(text) <= most:
        return text
    note = f" … [shortened from {len(text):,} characters; {where} has all] … "
    side = (most - len(note)) // 2
    return text[:side] + note + text[-side:]


def whole_characters(value: Any) -> Any:
    """A text without the halves of characters that file names and messages may hold, which no file
    can; other values as they are."""
    if not isinstance(value, str):
        return value
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
