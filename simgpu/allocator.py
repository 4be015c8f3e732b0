"""PyTorch's CUDA caching allocator for a card: pools, segments, best fit, splitting, merging.

PyTorch asks the driver for *segments* and hands out *blocks* of them. A freed block stays in the
allocator's cache and merges with free neighbours of its segment; a segment goes back to the driver
only when all of it is free and the cache is emptied, or when a request finds no room otherwise.
What fails for want of one piece large enough, with enough free bytes in small pieces, is called
fragmentation.

A block serves the stream that its segment was made for, and no other. What a stream takes while a
CUDA graph is captured on it comes from a pool of the graph's own, whose segments stay until no
graph has the pool any more, and then until the cache is emptied.

Source of the rules and constants: c10/cuda/CUDACachingAllocator.cpp of PyTorch 2.11 to 2.13. That a
block is used on other streams (``record_stream``) is not followed: it is free once released.
"""

import bisect
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from simgpu.addresses import AddressSpace
from simgpu.memory_stats import TOGETHER, Log
from simgpu.units import MIB, as_pytorch_writes

BLOCK_ROUNDING = 512
SMALL_REQUEST = 1 * MIB
SMALL_SEGMENT = 2 * MIB
LARGE_REQUEST = 10 * MIB
LARGE_SEGMENT = 20 * MIB
SEGMENT_ROUNDING = 2 * MIB
LEAST_MAX_SPLIT = LARGE_SEGMENT  # PyTorch refuses a max_split_size_mb below this
UNLIMITED = 2**63
DOCUMENTATION = (
    "https://docs.pytorch.org/docs/stable/notes/cuda.html"
    "#optimizing-memory-usage-with-pytorch-cuda-alloc-conf"
)


def round_up(size_bytes: int, multiple: int) -> int:
    """``size_bytes`` rounded up to a multiple."""
    return -(-size_bytes // multiple) * multiple


def block_bytes(size_bytes: int) -> int:
    """Bytes looked for when a request comes in: a multiple of 512, at least one."""
    return round_up(size_bytes, BLOCK_ROUNDING) or BLOCK_ROUNDING


def segment_bytes(size_bytes: int) -> int:
    """Bytes asked of the driver when nothing cached fits: "Tried to allocate" in the message."""
    if size_bytes <= SMALL_REQUEST:
        return SMALL_SEGMENT
    if size_bytes < LARGE_REQUEST:
        return LARGE_SEGMENT
    return round_up(size_bytes, SEGMENT_ROUNDING)


class Pool(list):
    """Free blocks, as best fit looks at them: (size, address, block).

    They serve small requests or large ones, of a graph (0 for none) on a stream (0 by default).
    """

    def __init__(self, graph: int, stream: int, small: bool):
        super().__init__()
        self.graph, self.stream, self.small = graph, stream, small


@dataclass(slots=True, eq=False)
class Block:
    """A piece of a segment. ``before`` and ``after`` are its neighbours in the same segment.

    ``mapped`` is False where an expandable segment has addresses but no memory. ``pool`` is where
    it lies among others when it is free.
    """

    address: int
    size: int
    pool: "Pool"
    mapped: bool = True
    before: "Block | None" = None
    after: "Block | None" = None
    free: bool = False
    requested: int = 0  # bytes, before rounding


@dataclass(eq=False)
class Allocator:
    """One card's memory as PyTorch's allocator manages it.

    Args:
        index: number of the card, as in "GPU 0".
        device_name: for example "NVIDIA L4"; the message says which card was simulated.
        total_bytes: what the driver reports as the card's capacity.
        context_bytes: taken by this process outside PyTorch's allocator, as by the CUDA context.
        fraction: ``set_per_process_memory_fraction``; None, before it is called, means no cap.
        system_bytes: taken by the driver for itself, counted to no process.
        max_split_bytes: ``max_split_size_mb``: larger blocks are not split, but given back.
        addresses: those of the process, which all its cards share; by default of this card alone.
            Expandable segments have a range of addresses each and take none of these.
        capped: False gives more than the card has, to see what a run needs.
        stream: asked for the stream that a request comes on.

    Attributes:
        allocated, reserved: bytes in blocks that are handed out, and in segments, now; ``peak_``
            since the last reset.
        retries, errors: how often cached memory had to go for a request, and that was not enough
            (``num_alloc_retries``, ``num_ooms``).
        blocks, segments: what came and went, for ``memory_stats``.
        listeners: called before every allocation (False) and release (True) with this allocator.
        trace: called with the card, an action of ``history``, an address, a size in bytes and the
            pool.
        captures: by stream, the pool of the graph that is captured on it.
    """

    index: int
    device_name: str
    total_bytes: int
    context_bytes: int = 0
    fraction: float | None = None
    system_bytes: int = field(default=0, kw_only=True)
    max_split_bytes: int = field(default=UNLIMITED, kw_only=True)
    addresses: AddressSpace = field(default_factory=AddressSpace, kw_only=True, repr=False)
    capped: bool = field(default=True, kw_only=True)
    stream: Callable[[], int] = field(default=lambda: 0, kw_only=True, repr=False)

    def __post_init__(self):
        if self.max_split_bytes <= LEAST_MAX_SPLIT:
            raise ValueError(
                f"max_split_size_mb is {self.max_split_bytes / MIB:g}; PyTorch takes only more than"
                f" {LEAST_MAX_SPLIT // MIB}. Raise it, or leave it out."
            )
        self.allocated = self.reserved = 0
        self.peak_allocated = self.peak_reserved = 0
        self.retries = self.errors = 0
        self.blocks = Log("allocation", "allocated_bytes", "requested_bytes")
        self.segments = Log("segment", "reserved_bytes")
        self.listeners: list[Callable[[Allocator, bool], None]] = []
        self.trace: Callable[[int, str, int, int, Pool], None] | None = None
        self.captures: dict[int, int] = {}
        self._graphs: Counter[int] = Counter()  # of each pool that a graph has
        self._pools: dict[tuple[int, int, bool], Pool] = {}

    @property
    def allowed_bytes(self) -> int:
        """The cap on reserved bytes set by ``set_per_process_memory_fraction``."""
        return int(self.total_bytes * (1.0 if self.fraction is None else self.fraction))

    @property
    def available_bytes(self) -> int:
        """What of the card is neither the context's nor the driver's own."""
        return self.total_bytes - self.system_bytes - self.context_bytes

    @property
    def limit_bytes(self) -> int:
        """Most bytes PyTorch can reserve: the rest of the card, or the cap if that is less."""
        return min(self.available_bytes, self.allowed_bytes) if self.capped else UNLIMITED

    @property
    def free_bytes(self) -> int:
        """What ``torch.cuda.mem_get_info`` reports as free."""
        return max(0, self.available_bytes - self.reserved)

    def allocate(self, size_bytes: int) -> Block:
        """Take a block, for ``free`` to give back; its ``size`` includes what was not split off.

        Raises:
            torch.OutOfMemoryError: the card has no room, with PyTorch's own text.
        """
        for listener in self.listeners:
            listener(self, False)
        size = block_bytes(size_bytes)
        small = size <= SMALL_REQUEST
        pool = self._pool(small)
        block = self._cached(size, pool) or self._new(size, pool)
        if block is None and self._release_oversize(size, pool):
            block = self._new(size, pool)
        if block is None and not self.captures:
            self.empty_cache()
            self.retries += 1
            block = self._new(size, pool)
        if block is None:
            self.errors += 1
            self._note("oom", self.free_bytes, segment_bytes(size), pool)
            raise torch.OutOfMemoryError(self._message(segment_bytes(size)))
        if self._splits(size, block.size - size, small):
            self._insert(self._split(block, size))
        block.requested = size_bytes
        self._note("alloc", block.address, size_bytes, pool)
        self.blocks.append((small, block.size, size_bytes))
        if len(self.blocks) >= TOGETHER:
            self.blocks.count()
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block):
        """Give a block back. It stays reserved, as in PyTorch, until room is needed."""
        for listener in self.listeners:
            listener(self, True)
        self.blocks.append((block.pool.small, -block.size, -block.requested))
        self.allocated -= block.size
        for action in ("free_requested", "free_completed"):
            self._note(action, block.address, block.requested, block.pool)
        block.requested = 0
        self._merge(block)
        self._insert(block)

    def empty_cache(self):
        """Give every segment without a block in use, and in no graph's pool, back to the driver."""
        for block in self._releasable():
            if block.before is None and block.after is None:
                self._give_back(block)

    def begin_capture(self, pool: int):
        """What the present stream takes from now on comes from a graph's pool."""
        self._graphs[pool] += 1
        self.captures[self.stream()] = pool

    def end_capture(self):
        """What the present stream takes from now on comes from no graph's pool."""
        del self.captures[self.stream()]

    def release_pool(self, pool: int):
        """A graph that had the pool is gone."""
        self._graphs[pool] -= 1

    def reset_peaks(self):
        """Start new peaks at the present values."""
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved
        for log in (self.blocks, self.segments):
            log.reset_peaks()

    def reset_totals(self):
        """Count what has come and gone from here."""
        for log in (self.blocks, self.segments):
            log.reset_totals()
        self.retries = self.errors = 0

    def cached(self) -> list[Block]:
        """The free blocks."""
        return [block for pool in self._pools.values() for *_, block in pool]

    def _note(self, *event):
        if self.trace is not None:
            self.trace(self.index, *event)

    def _pool(self, small: bool) -> Pool:
        """What a request of now is served from."""
        stream = self.stream()
        key = (self.captures.get(stream, 0), stream, small)
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools[key] = Pool(*key)
        return pool

    def _releasable(self) -> list[Block]:
        """The free blocks of pools that no graph has."""
        pools = (pool for pool in self._pools.values() if not self._graphs[pool.graph])
        return [block for *_, block in itertools.chain(*pools)]

    @staticmethod
    def _insert(block: Block):
        block.free = True
        bisect.insort(block.pool, (block.size, block.address, block))

    @staticmethod
    def _remove(block: Block):
        block.free = False
        pool = block.pool
        del pool[bisect.bisect_left(pool, (block.size, block.address))]

    @staticmethod
    def _split(block: Block, size: int) -> Block:
        """Cut a block to ``size``; returns the rest, which is in no pool yet."""
        rest = Block(block.address + size, block.size - size, block.pool)
        rest.before, rest.after = block, block.after
        if block.after is not None:
            block.after.before = rest
        block.after, block.size = rest, size
        return rest

    def _merge(self, block: Block):
        """Take the free neighbours of a block out of their pool and into the block."""
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free and neighbour.mapped:
                self._remove(neighbour)
                self._absorb(block, neighbour)

    @staticmethod
    def _absorb(block: Block, neighbour: Block):
        block.size += neighbour.size
        if neighbour is block.before:
            block.address = neighbour.address
            block.before = neighbour.before
            if block.before is not None:
                block.before.after = block
        else:
            block.after = neighbour.after
            if block.after is not None:
                block.after.before = block

    def _splits(self, size: int, rest: int, small: bool) -> bool:
        """Whether ``rest`` bytes behind a request become a block of their own."""
        if small:
            return rest >= BLOCK_ROUNDING
        return rest > SMALL_REQUEST and size < self.max_split_bytes

    def _best(self, pool: Pool, place: int) -> int:
        """Which of the blocks from ``place`` on, all large enough, is taken."""
        return place

    def _cached(self, size: int, pool: Pool) -> Block | None:
        """Best fit: the smallest free block large enough, the lowest address among equals."""
        place = bisect.bisect_left(pool, (size,))
        if place == len(pool):
            return None
        place = self._best(pool, place)
        found = pool[place][2]
        # An oversize block is kept for oversize requests, of about its size.
        is_oversize = size >= self.max_split_bytes
        if found.size >= (size + LARGE_SEGMENT if is_oversize else self.max_split_bytes):
            return None
        del pool[place]
        found.free = False
        return found

    def _new(self, size: int, pool: Pool) -> Block | None:
        """A block of memory new to PyTorch, or None when the card or the cap has no room for it."""
        wanted = segment_bytes(size)
        if self.reserved + wanted > self.limit_bytes:
            return None
        self._reserve(wanted, pool.small)
        address = self.addresses.take(wanted)
        self._note("segment_alloc", address, wanted, pool)
        return Block(address, wanted, pool)

    def _reserve(self, size: int, small: bool):
        self.segments.append((small, size, 0))
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _give_back(self, segment: Block):
        self._remove(segment)
        self.segments.append((segment.pool.small, -segment.size, 0))
        self.reserved -= segment.size
        self._note("segment_free", segment.address, segment.size, segment.pool)
        self.addresses.give_back(segment.address)

    def _release_oversize(self, size: int, pool: Pool) -> bool:
        """With max_split_size_mb: give back a cached block large enough, or several large ones."""
        least = max(size, self.max_split_bytes)
        place = bisect.bisect_left(pool, (least,))
        chosen, released = [], 0
        for entry in pool[place : place + 1] or reversed(pool):
            if released < least and entry[0] >= self.max_split_bytes:
                chosen.append(entry[2])
                released += entry[0]
        if released < least:
            return False
        for block in chosen:
            self._give_back(block)
        return True

    def _message(self, tried_bytes: int) -> str:
        size = as_pytorch_writes
        allowed = "" if self.fraction is None else f"{size(self.allowed_bytes)} allowed; "
        private = sum(block.size for block in self.cached() if block.pool.graph)
        pools = f"with {size(private)} allocated in private pools (e.g., CUDA Graphs), "
        return (
            f"CUDA out of memory. Tried to allocate {size(tried_bytes)}. GPU {self.index}"
            f" has a total capacity of {size(self.total_bytes)} of which"
            f" {size(self.free_bytes)} is free. Including non-PyTorch memory, this process"
            f" has {size(self.reserved + self.context_bytes)} memory in use. {allowed}Of the"
            f" allocated memory {size(self.allocated + private)} is allocated by PyTorch,"
            f" {pools if private else ''}and"
            f" {size(self.reserved - self.allocated - private)} is reserved by PyTorch but"
            " unallocated. If reserved but unallocated memory is large try setting"
            " PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See"
            f" documentation for Memory Management  ({DOCUMENTATION}) [simulated"
            f" {self.device_name}]"
        )
