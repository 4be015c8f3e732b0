"""Bytes in words."""


def bytes_in_words(size: int) -> str:
    """Bytes with a unit: GiB with two decimals, smaller sizes with one."""
    for unit, scale, decimals in (("GiB", 2**30, 2), ("MiB", 2**20, 1), ("KiB", 2**10, 1)):
        if size >= scale:
            return f"{size / scale:.{decimals}f} {unit}"
    return f"{size} bytes"
