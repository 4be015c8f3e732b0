"""Where the CUDA driver puts the segments that PyTorch asks for.

Among free blocks of one size PyTorch takes the one with the lowest address, so which of two equal
holes is filled next depends on the driver. The rules were read off the addresses in a trace of
PyTorch's allocator on an H100 (driver 580, torch 2.11, 2026-11-25; ``benchmarks/memory.py
--trace``). Of its 232 segments 201 lie where they say, all of those that do not begin a region,
which has to lie somewhere:

- The driver maps regions of whole 32 MiB, each below those it has as far as there is room. A
  segment goes into the newest region that has a hole large enough, and there into the smallest such
  hole, the lowest of equals. Where no region has one, a new region is mapped, and what the segment
  leaves of it is a hole.
- A region in which nothing is left is unmapped.
- What the driver takes for itself, kernels above all, lies in the same holes. It is never given
  back, and so neither is the region around it.
"""

import bisect

from simgpu.units import MIB

REGION = 32 * MIB
# The first region is the context's own and stays; in it one hole at the end is set off.
FIRST_REGION, SET_OFF = 416 * MIB, 2 * MIB
TOP = 2**46


class AddressSpace:
    """Gives addresses to segments and takes them back; sizes in bytes."""

    def __init__(self, cards: int = 1):
        # Newest first: (address, size, holes), the holes as (size, address), best fit first.
        rest = FIRST_REGION - SET_OFF
        self._regions: list[tuple[int, int, list[tuple[int, int]]]] = [
            (start, FIRST_REGION, [(SET_OFF, start + rest), (rest, start)])
            for start in (TOP + card * FIRST_REGION for card in range(cards))
        ]
        self._taken: dict[int, int] = {}

    def take(self, size: int) -> int:
        """The address of a new segment, or of what the driver takes for itself."""
        for _, _, holes in self._regions:
            place = bisect.bisect_left(holes, (size,))
            if place < len(holes):
                break
        else:
            holes, place = self._map(-(-size // REGION) * REGION), 0
        room, address = holes.pop(place)
        if room > size:
            bisect.insort(holes, (room - size, address + size))
        self._taken[address] = size
        return address

    def give_back(self, address: int):
        """A segment went back to the driver."""
        size = self._taken.pop(address)
        region = next(each for each in self._regions if each[0] <= address < each[0] + each[1])
        start, whole, holes = region
        for hole in [each for each in holes if sum(each) == address or each[1] == address + size]:
            holes.remove(hole)
            size, address = size + hole[0], min(address, hole[1])
        if size == whole and start < TOP:
            self._regions.remove(region)
        else:
            bisect.insort(holes, (size, address))

    def _map(self, size: int) -> list[tuple[int, int]]:
        """The one hole of a new region in the highest gap below the first one."""
        end = TOP
        for start, whole in sorted((each[:2] for each in self._regions), reverse=True):
            if start < TOP and end - (start + whole) >= size:
                break
            end = start
        holes = [(size, end - size)]
        self._regions.insert(0, (end - size, size, holes))
        return holes
