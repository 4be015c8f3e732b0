"""Bytes on one simulated card, counted as PyTorch's CUDA caching allocator counts them.

First version: allocated bytes are exact (every request rounded up to 512 bytes, each storage counted once),
while reserved bytes are the high-water mark of what was allocated since the cache was last emptied. The
pools, segments and splits that decide fragmentation are to come behind this same class.

Source of the constants: c10/cuda/CUDACachingAllocator.cpp of PyTorch 2.11 to 2.13.
"""

import torch

MIB = 2**20
BLOCK_ROUNDING = 512
SMALL_REQUEST = 1 * MIB
SMALL_SEGMENT = 2 * MIB
LARGE_REQUEST = 10 * MIB
LARGE_SEGMENT = 20 * MIB
SEGMENT_ROUNDING = 2 * MIB
DOCUMENTATION = (
    "https://docs.pytorch.org/docs/stable/notes/cuda.html"
    "#optimizing-memory-usage-with-pytorch-cuda-alloc-conf"
)


def round_up(size_bytes: int, multiple: int) -> int:
    """``size_bytes`` rounded up to a multiple."""
    return -(-size_bytes // multiple) * multiple


def block_bytes(size_bytes: int) -> int:
    """Bytes the allocator hands out for a request: a multiple of 512, at least one; 0 for an empty tensor."""
    return round_up(size_bytes, BLOCK_ROUNDING)


def segment_bytes(size_bytes: int) -> int:
    """Bytes asked of the driver when nothing cached fits; the "Tried to allocate" of the message."""
    if size_bytes <= SMALL_REQUEST:
        return SMALL_SEGMENT
    if size_bytes < LARGE_REQUEST:
        return LARGE_SEGMENT
    return round_up(size_bytes, SEGMENT_ROUNDING)


def format_size(size_bytes: int) -> str:
    """As ``format_size`` in CUDACachingAllocator.cpp: two decimals and a binary unit."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size_bytes > unit:
            return f"{size_bytes / unit:.2f} {name}"
    return f"{size_bytes} bytes"


class Allocator:
    """Allocated and reserved bytes of one card, and the error when they would exceed what it has.

    Args:
        index: number of the card, as in "GPU 0".
        device_name: for example "NVIDIA L4"; the message says which card was simulated.
        total_bytes: what the driver reports as the card's capacity.
        context_bytes: taken by the CUDA context, outside PyTorch's allocator.
        fraction: ``set_per_process_memory_fraction``; 1.0 means no cap.
    """

    def __init__(
        self, index: int, device_name: str, total_bytes: int, context_bytes: int = 0, fraction: float = 1.0
    ):
        self.index = index
        self.device_name = device_name
        self.total_bytes = total_bytes
        self.context_bytes = context_bytes
        self.fraction = fraction
        self.allocated = self.reserved = 0
        self.peak_allocated = self.peak_reserved = 0

    @property
    def allowed_bytes(self) -> int:
        """The cap on reserved bytes set by ``set_per_process_memory_fraction``."""
        return int(self.total_bytes * self.fraction)

    @property
    def limit_bytes(self) -> int:
        """Most bytes PyTorch can reserve: the rest of the card, or the per-process cap if that is less."""
        return min(self.total_bytes - self.context_bytes, self.allowed_bytes)

    @property
    def free_bytes(self) -> int:
        """What ``torch.cuda.mem_get_info`` reports as free."""
        return self.total_bytes - self.context_bytes - self.reserved

    def allocate(self, size_bytes: int) -> int:
        """Take a block and return its size in bytes, which is what ``free`` wants back.

        Raises:
            torch.OutOfMemoryError: the card has no room, with PyTorch's own text.
        """
        block = block_bytes(size_bytes)
        wanted = self.allocated + block
        if wanted > self.reserved:
            if wanted > self.limit_bytes:
                raise torch.OutOfMemoryError(self._message(segment_bytes(block)))
            self.reserved = self._reserved_for(wanted)
            self.peak_reserved = max(self.peak_reserved, self.reserved)
        self.allocated = wanted
        if wanted > self.peak_allocated:
            self.peak_allocated = wanted
        return block

    def free(self, block: int):
        """Give a block back. It stays reserved, as in PyTorch, until ``empty_cache``."""
        self.allocated -= block

    def empty_cache(self):
        """Give cached, unused memory back to the driver."""
        self.reserved = self._reserved_for(self.allocated)

    def reset_peaks(self):
        """Start new peaks at the present values."""
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def _reserved_for(self, allocated_bytes: int) -> int:
        whole_segments = min(round_up(allocated_bytes, SEGMENT_ROUNDING), self.limit_bytes)
        return max(whole_segments, allocated_bytes)  # a cap set later may lie below what is allocated

    def _message(self, tried_bytes: int) -> str:
        # When a request fails, cached blocks have been given back to the driver first.
        self.empty_cache()
        in_use = self.reserved + self.context_bytes
        allowed = f"{format_size(self.allowed_bytes)} allowed; " if self.fraction < 1 else ""
        return (
            f"CUDA out of memory. Tried to allocate {format_size(tried_bytes)}. GPU {self.index} has a total "
            f"capacity of {format_size(self.total_bytes)} of which {format_size(self.free_bytes)} is free. "
            f"Including non-PyTorch memory, this process has {format_size(in_use)} memory in use. {allowed}"
            f"Of the allocated memory {format_size(self.allocated)} is allocated by PyTorch, and "
            f"{format_size(self.reserved - self.allocated)} is reserved by PyTorch but unallocated. "
            "If reserved but unallocated memory is large try setting "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  "
            f"See documentation for Memory Management  ({DOCUMENTATION}) "
            f"[simulated {self.device_name}]"
        )
