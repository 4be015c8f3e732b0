"""Reads PyTorch's out-of-memory message, the same text from a real and a simulated card.

Needs no torch: also programs that only read what others left behind, as reports of runs, use it.
"""

import re
from dataclasses import dataclass

from simgpu.units import parse_size

_FIELDS = {
    "tried_bytes": r"Tried to allocate (?P<size>[\d.]+ \w+)\.",
    "capacity_bytes": r"total capacity of (?P<size>[\d.]+ \w+) ",
    "free_bytes": r"of which (?P<size>[\d.]+ \w+) is free",
    "process_bytes": r"this process has (?P<size>[\d.]+ \w+) memory in use",
    "allocated_bytes": r"(?P<size>[\d.]+ \w+) is allocated by PyTorch",
    "unallocated_bytes": r"(?P<size>[\d.]+ \w+) is reserved by PyTorch but unallocated",
}


@dataclass(frozen=True)
class OutOfMemoryMessage:
    """The figures of the message in bytes, as exact as its two decimals.

    Attributes:
        device: index of the card.
        tried_bytes: what PyTorch asked the driver for, the tensor rounded up to a segment.
        capacity_bytes: the card's memory as the driver reports it.
        free_bytes: not in use by any process.
        process_bytes: in use by this process, the CUDA context included.
        allocated_bytes: in tensors.
        unallocated_bytes: kept by PyTorch's allocator for later tensors.
        allowed_bytes: what PyTorch may reserve by ``set_per_process_memory_fraction``, or None.
    """

    device: int
    tried_bytes: int
    capacity_bytes: int
    free_bytes: int
    process_bytes: int
    allocated_bytes: int
    unallocated_bytes: int
    allowed_bytes: int | None = None

    @property
    def short_bytes(self) -> int:
        """How much more memory the request needed: free on the card, and allowed to the process."""
        room = self.free_bytes
        if self.allowed_bytes is not None:
            room = min(room, self.allowed_bytes - self.allocated_bytes - self.unallocated_bytes)
        return max(0, self.tried_bytes - max(0, room))

    @property
    def outside_bytes(self) -> int:
        """In use by this process, but not by PyTorch's allocator: the CUDA context, mostly."""
        return self.process_bytes - self.allocated_bytes - self.unallocated_bytes


def parse_out_of_memory(message: str | BaseException | None) -> OutOfMemoryMessage:
    """Take the message of a ``torch.OutOfMemoryError`` apart.

    Raises:
        ValueError: the text is not such a message, or there is none, as of a stage that fitted.
    """
    if message is None:
        raise ValueError(
            "there is no out-of-memory message: what ran did fit. Expected one that does not;"
            " choose a smaller card or a larger batch."
        )
    text = str(message)
    device = re.search(r"GPU (\d+) has", text)
    found = {name: re.search(pattern, text) for name, pattern in _FIELDS.items()}
    missing = [name for name, match in found.items() if match is None]
    if device is None or missing:
        raise ValueError(
            "not an out-of-memory message of PyTorch's CUDA allocator (no"
            f" {(missing or ['device'])[0]}): {text[:80]!r}. Pass the exception that"
            " torch.OutOfMemoryError caught, or its text."
        )
    allowed = re.search(r"([\d.]+ \w+) allowed;", text)
    return OutOfMemoryMessage(
        int(device[1]),
        **{name: parse_size(match["size"]) for name, match in found.items()},
        allowed_bytes=parse_size(allowed[1]) if allowed else None,
    )


def explain(error: str, traceback: str = "") -> dict | None:
    """Where a program ran out of memory, from what it left: its error, and the traceback behind it.

    Args:
        error: the exception as text, with or without its class in front.
        traceback: as Python or Jupyter print it, with the note that ``rig.stage`` adds.

    Returns:
        ``device`` (index of the card), ``phase`` (name of the stage), ``short_bytes`` (how much
        more memory the request needed) and ``needs_bytes`` (what the process held of the card, with
        the request: it needs at least so much), each None where the text does not tell; or None if
        the error is none of PyTorch's out-of-memory errors.
    """
    if not re.match(r"[\w.]*OutOfMemoryError\b|CUDA out of memory", error):
        return None
    # The note stands behind the message; before it are lines of code, which may contain anything.
    _, found, notes = traceback.rpartition("out of memory")
    phase = re.search(r'in the stage "([^"]+)"', notes) if found else None
    answer = {"device": None, "phase": phase and phase[1], "short_bytes": None, "needs_bytes": None}
    try:
        message = parse_out_of_memory(error)
    except ValueError:
        return answer
    needs = message.process_bytes + message.tried_bytes
    answer |= {"device": message.device, "short_bytes": message.short_bytes}
    return answer | {"needs_bytes": needs}
