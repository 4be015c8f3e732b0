"""Sizes in bytes: binary units, and how a size is written and read."""

KIB, MIB, GIB = 2**10, 2**20, 2**30
_UNITS = {"GiB": GIB, "MiB": MIB, "KiB": KIB, "bytes": 1}


def bytes_in_words(size_bytes: int) -> str:
    """GiB with two decimals, smaller sizes with one: "12.97 GiB", "3.0 MiB", "17 bytes"."""
    for unit, decimals in (("GiB", 2), ("MiB", 1), ("KiB", 1)):
        if size_bytes >= _UNITS[unit]:
            return f"{size_bytes / _UNITS[unit]:.{decimals}f} {unit}"
    return f"{size_bytes} bytes"


def as_pytorch_writes(size_bytes: int) -> str:
    """As ``format_size`` in CUDACachingAllocator.cpp: two decimals, and 1024.00 KiB for one MiB."""
    for unit in ("GiB", "MiB", "KiB"):
        if size_bytes > _UNITS[unit]:
            return f"{size_bytes / _UNITS[unit]:.2f} {unit}"
    return f"{size_bytes} bytes"


def parse_size(text: str) -> int:
    """Bytes of a size with its unit, such as "1.16 GiB"; as exact as its decimals.

    Raises:
        ValueError: not a number and one of the units above.
    """
    number, _, unit = text.partition(" ")
    if unit not in _UNITS:
        raise ValueError(f"{text!r} is no size; expected a number and one of {', '.join(_UNITS)}.")
    return round(float(number) * _UNITS[unit])
