"""Figures as people read them: bytes in the unit that suits them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_SIZES = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def is_number(value: Any) -> bool:
    """Whether a value is a finite int or float; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


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
