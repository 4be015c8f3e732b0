"""The allocator with ``expandable_segments:True``: segments that grow and shrink.

A pool then has one long run of addresses, and memory is mapped behind them in units where it is
needed, so that free pieces that touch can serve one large request. Source: as in ``allocator``; the
driver's virtual memory functions.
"""

import bisect
from collections import defaultdict

from simgpu.allocator import (
    BLOCK_ROUNDING,
    LARGE_SEGMENT,
    SMALL_SEGMENT,
    UNLIMITED,
    Allocator,
    Block,
    Pool,
    round_up,
    segment_bytes,
)

# Segments lie far apart, at multiples of every mapping unit, so that blocks of two never touch.
ADDRESS_GAP = LARGE_SEGMENT * 2**20


class ExpandableAllocator(Allocator):
    """As ``Allocator``, with expandable segments."""

    def __post_init__(self):
        super().__post_init__()
        if self.max_split_bytes != UNLIMITED:
            raise ValueError(
                "expandable_segments and max_split_size_mb are not simulated together; with"
                " expandable segments splitting does no harm. Leave max_split_size_mb out."
            )
        self._next_address = 0
        # Addresses without memory behind them, by pool, lowest first.
        self._unmapped: dict[int, list[tuple[int, Block]]] = defaultdict(list)  # by id of the pool

    def empty_cache(self):
        """Give the memory behind free blocks back to the driver, in whole mapping units."""
        for block in self._releasable():
            self._unmap(block)

    def _splits(self, size: int, rest: int, small: bool) -> bool:
        return rest >= BLOCK_ROUNDING

    def _best(self, pool, place: int) -> int:
        # A segment's free end counts with what it could grow to: inner blocks are used first.
        def growth(entry):
            size, _, block = entry
            return size + (block.after.size if block.after and not block.after.mapped else 0)

        while place + 1 < len(pool) and growth(pool[place + 1]) < growth(pool[place]):
            place += 1
        return place

    def _new(self, size: int, pool: Pool) -> Block | None:
        """A free block of an expandable segment, with memory mapped where it had only addresses."""
        # PyTorch checks the cap with what a new segment would take, and only then looks.
        if self.reserved + segment_bytes(size) > self.allowed_bytes:
            return None
        block = self._run_of(size, pool)
        if not block.mapped and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            following = block.after
            if not self._map(following, min(size - block.size, following.size)):
                return None
            block = following
        self._remove(block)
        return block

    def _run_of(self, size: int, pool: Pool) -> Block:
        """The lowest run of free and unmapped blocks with ``size`` addresses, or a new segment."""
        for _, block in self._unmapped[id(pool)]:
            if block.before is not None and block.before.free:
                block = block.before
            room, following = 0, block
            while room < size and following is not None and following.free:
                room, following = room + following.size, following.after
            if room >= size:
                return block
        # As many addresses as the card could ever need; they cost nothing.
        block = Block(self._next_address, ADDRESS_GAP, pool)
        self._next_address += 2 * ADDRESS_GAP
        self._insert_unmapped(block)
        return block

    def _map(self, block: Block, size: int) -> bool:
        """Put memory behind the first ``size`` addresses of a block; False if none is left."""
        mapped = round_up(size, SMALL_SEGMENT if block.pool.small else LARGE_SEGMENT)
        if self.reserved + mapped > self.available_bytes:
            return False
        self._take_from_unmapped(block)
        if block.size > mapped:
            self._insert_unmapped(self._split(block, mapped))
        block.mapped = True
        self._reserve(mapped, block.pool.small)
        self._note("segment_map", block.address, mapped, block.pool)
        self._merge(block)
        self._insert(block)
        return True

    def _unmap(self, block: Block):
        """Give the memory of whole mapping units inside a free block back; its addresses stay."""
        unit = SMALL_SEGMENT if block.pool.small else LARGE_SEGMENT
        begin = round_up(block.address, unit)
        end = (block.address + block.size) // unit * unit
        if end <= begin:
            return
        self._remove(block)
        if end < block.address + block.size:
            self._insert(self._split(block, end - block.address))
        if begin > block.address:
            middle = self._split(block, begin - block.address)
            self._insert(block)
            block = middle
        self.segments.append((block.pool.small, -block.size, 0))
        self.reserved -= block.size
        self._note("segment_unmap", block.address, block.size, block.pool)
        for neighbour in (block.before, block.after):
            if neighbour is not None and not neighbour.mapped:
                self._take_from_unmapped(neighbour)
                self._absorb(block, neighbour)
        self._insert_unmapped(block)

    def _insert_unmapped(self, block: Block):
        block.free, block.mapped = True, False
        bisect.insort(self._unmapped[id(block.pool)], (block.address, block))

    def _take_from_unmapped(self, block: Block):
        unmapped = self._unmapped[id(block.pool)]
        del unmapped[bisect.bisect_left(unmapped, (block.address,))]
