"""Where the CUDA driver puts the segments that PyTorch asks for.

Among free blocks of one size PyTorch takes the one with the lowest address, so which of two equal holes is filled next
depends on the driver. The rules were read off the addresses in traces of PyTorch's allocator on an H100 (driver 580,
torch 2.11, 2026-11-25; ``benchmarks/memory.py --trace``): a segment goes into the smallest hole that is large enough,
the lowest of equals. Where there is none, or the segment is large, the driver maps a new region of whole 32 MiB, below
those it has, and what the segment leaves of it is a hole.
"""

import bisect

MIB = 2**20
REGION = 32 * MIB
# The driver begins with a region of its own, at the upper end, for whatever is not large.
FIRST_REGION, LARGE = 256 * MIB, 128 * MIB
TOP = 2**46


class AddressSpace:
    """Gives addresses to segments and takes them back; sizes in bytes."""

    def __init__(self):
        self._holes: list[tuple[int, int]] = [(FIRST_REGION, TOP)]  # size and address, best fit first
        self._regions: dict[int, int] = {TOP: FIRST_REGION}  # address to size
        self._taken: dict[int, int] = {}

    def take(self, size: int) -> int:
        """The address of a new segment."""
        place = bisect.bisect_left(self._holes, (size,))
        if place == len(self._holes) or size > LARGE:
            hole = self._map(-(-size // REGION) * REGION)
        else:
            hole = self._holes.pop(place)
        room, address = hole
        if room > size:
            bisect.insort(self._holes, (room - size, address + size))
        self._taken[address] = size
        return address

    def give_back(self, address: int):
        """A segment went back to the driver; a region without any other is unmapped."""
        size = self._taken.pop(address)
        for hole in [
            hole for hole in self._holes if hole[1] + hole[0] == address or hole[1] == address + size
        ]:
            if self._region(hole[1]) == self._region(address):
                self._holes.remove(hole)
                size, address = size + hole[0], min(address, hole[1])
        if self._regions.get(address) == size and address != TOP:
            del self._regions[address]
        else:
            bisect.insort(self._holes, (size, address))

    def _region(self, address: int) -> int:
        starts = sorted(self._regions)
        return starts[bisect.bisect_right(starts, address) - 1]

    def _map(self, size: int) -> tuple[int, int]:
        """A new region in the highest gap below the first one."""
        end = TOP
        for start in sorted(self._regions, reverse=True):
            if start < TOP and end - (start + self._regions[start]) >= size:
                break
            end = start
        self._regions[end - size] = size
        return size, end - size
