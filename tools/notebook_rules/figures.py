"""Figures in texts: found, with their units, and compared at the digits that a sentence shows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

_BYTES = {"bytes": 1, "byte": 1}
_BYTES |= {f"{letter}iB": 2 ** (10 * power) for power, letter in enumerate("KMGT", 1)}
_BYTES |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}
_SECONDS = {"s": 1, "seconds": 1, "second": 1, "ms": Fraction(1, 1000)}
_SECONDS |= {"minutes": 60, "minute": 60}
_SCALES = {"billion": 10**9, "million": 10**6, "thousand": 1000}
# Units of one kind are converted into each other; those of two kinds are never the same.
_KINDS = {"bytes": _BYTES, "seconds": _SECONDS, "count": _SCALES, "%": {"%": 1}}
_UNITS = {unit: (kind, size) for kind, units in _KINDS.items() for unit, size in units.items()}
_UNIT = "|".join(sorted(map(re.escape, _UNITS), key=len, reverse=True))
_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    " fifteen sixteen seventeen eighteen nineteen twenty"
).split()
_WORD_VALUES = {word: number for number, word in enumerate(_WORDS)}
_WORD_VALUES |= {"thirty": 30, "forty": 40, "fifty": 50}

# No figures: names of notebooks, cards, versions, dates, addresses, issues; and indices.
_NAMES = re.compile(
    r"https?://\S+|\b\d\d · |\d{4}-\d\d-\d\d|#\d+"
    r"|\b(?:RTX|A|GLM-|CUDA|[Tt]orch|PyTorch|[Tt]ransformers"
    r"|accelerate|Python|Hopper|[Nn]otebooks?|[Ee]xercises?|[Ll]ayer|GPU|[Cc]ard|[Cc]ell) \d[\w.-]*"
    r"(?!\d| ?(?:[KMGT]i?B|%))|\b\d+(?=-bit| bits?\b)|(?<![\d.,])0\d\b(?! ?[KMGT]i?B)"
)
_NUMBER = re.compile(
    rf"(?<![\w.^/#])(?<![A-Za-z]-)(?P<number>\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?|\d+(?:\.\d+)?)"
    rf"(?:e(?P<power>[+-]?\d+))?"
    rf"(?P<gap>[ -]?)(?P<unit>(?:{_UNIT})(?![\w/]))?(?![\w^])(?!\.\d)"
)
_WORD = re.compile(rf"\b(?:{'|'.join(_WORD_VALUES)})\b(?!-)", re.IGNORECASE)


@dataclass(frozen=True)
class Figure:
    """A number as it stands in a text.

    Attributes:
        text: the characters, such as "20.8 GiB" or "nine".
        value: the number without its unit.
        unit: such as "GiB"; "" for none.
        digits: after the decimal point, as shown; negative for powers of ten ("3.4e38": -37).
    """

    text: str
    value: Fraction
    unit: str = ""
    digits: int = 0
    is_word: bool = False

    @property
    def tolerance(self) -> Fraction:
        """Half of the last digit that is shown."""
        return Fraction(1, 2) / Fraction(10) ** self.digits

    def stands_for(self, other: Figure) -> bool:
        """Whether another number, rounded to the digits that this one shows, is this one.

        Bytes are converted from unit to unit, and so are seconds. A number without a unit may be of
        any: 13,906,320,896 is "13.9 billion", and bytes if "GiB" is asked for.
        """
        kind, size = _UNITS.get(self.unit, ("", 1))
        other_kind, other_size = _UNITS.get(other.unit, ("", 1))
        candidates = {other.value}
        if kind and other_kind:
            if kind != other_kind:
                return False
            candidates = {other.value * Fraction(other_size) / size}
        elif kind and abs(other.value) >= 10**6:
            candidates.add(other.value / Fraction(size))
        # Whole numbers without a unit are counts, which are not rounded.
        exact = not kind and self.digits <= 0 and self.value < 10_000
        return any(
            abs(value - self.value) <= (0 if exact else self.tolerance) for value in candidates
        )


def find_figures(text: str) -> list[Figure]:
    """Every number of a text, with digits or as a word."""
    text = re.sub(r"(?<=\d)_(?=\d)", "", text)  # as code groups digits
    text = _NAMES.sub(lambda found: " " * len(found[0]), text)
    found = []
    for match in _NUMBER.finditer(text):
        number, unit = match["number"].replace(",", ""), match["unit"] or ""
        digits = len(number.partition(".")[2]) - int(match["power"] or 0)
        value = Fraction(number) * Fraction(10) ** int(match["power"] or 0)
        found.append((match.start(), Figure(match[0].strip(" -"), value, unit, digits)))
    for match in _WORD.finditer(text):
        value = _WORD_VALUES[match[0].lower()]
        found.append((match.start(), Figure(match[0], Fraction(value), is_word=True)))
    return [figure for _, figure in sorted(found, key=lambda each: each[0])]


def is_among(figure: Figure, others: Iterable[Figure]) -> bool:
    """Whether one of the others is what the figure stands for."""
    return any(figure.stands_for(other) for other in others)
