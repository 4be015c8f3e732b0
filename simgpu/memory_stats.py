"""What an allocator has done, as ``torch.cuda.memory_stats`` and PyTorch's memory viewer have it.

Names and meanings: c10/cuda/CUDACachingAllocator.h and torch/cuda/memory.py of PyTorch 2.11 to
2.13; what is released is free at once, so "active" is what is allocated. Of free pieces of segments
(``inactive_split``) only the present number is known; it stands for the peak.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np

POOLS = {"all": slice(None), "large_pool": False, "small_pool": True}
# Changes are noted in a list, which is quick, and counted together so many at a time.
TOGETHER = 2**16


@dataclass(slots=True)
class Tally:
    """A quantity that comes and goes; ``allocated`` and ``freed`` add up what came and went."""

    current: int = 0
    peak: int = 0
    allocated: int = 0
    freed: int = 0

    def count(self, changes: np.ndarray):
        """Let the quantity change by these amounts, one after the other."""
        if not len(changes):
            return
        running = self.current + np.cumsum(changes)
        self.current = int(running[-1])
        self.peak = max(self.peak, int(running.max()))
        self.allocated += int(changes[changes > 0].sum())
        self.freed -= int(changes[changes < 0].sum())


class Log(list):
    """Changes of what the pools hold, and what they add up to.

    Entries: (of the small pool, bytes that came or, negative, went, bytes asked for).
    """

    def __init__(self, *quantities: str):
        super().__init__()
        self._quantities = quantities
        self._tallies = {(name, pool): Tally() for name in quantities for pool in POOLS}

    def count(self) -> dict[tuple[str, str], Tally]:
        """The tallies by quantity and pool; the entries are in them and gone."""
        small, size, requested = np.array(self, dtype=np.int64).reshape(-1, 3).T
        self.clear()
        amounts = dict(zip(self._quantities, (np.sign(size), size, requested), strict=False))
        for pool, which in POOLS.items():
            chosen = which if pool == "all" else small == which
            for name, changes in amounts.items():
                self._tallies[name, pool].count(changes[chosen])
        return self._tallies

    def reset_peaks(self):
        for tally in self.count().values():
            tally.peak = tally.current

    def reset_totals(self):
        for tally in self.count().values():
            tally.allocated = tally.freed = 0


def memory_stats(allocator) -> dict:
    """The nested dictionary behind ``torch.cuda.memory_stats``."""
    found: dict = {}
    for log in (allocator.blocks, allocator.segments):
        for (name, pool), tally in log.count().items():
            found.setdefault(name, {})[pool] = asdict(tally)
    parts = [block for block in allocator.cached() if block.before or block.after]
    for pool, which in POOLS.items():
        sizes = [block.size for block in parts if pool == "all" or block.pool.small == which]
        for name, value in (("inactive_split", len(sizes)), ("inactive_split_bytes", sum(sizes))):
            found.setdefault(name, {})[pool] = asdict(Tally(value, value, value, 0))
    found["active"], found["active_bytes"] = found["allocation"], found["allocated_bytes"]
    none = asdict(Tally())
    return found | {
        "oversize_allocations": none,
        "oversize_segments": none,
        "max_split_size": allocator.max_split_bytes if allocator.max_split_bytes < 2**63 else -1,
        "num_alloc_retries": allocator.retries,
        "num_ooms": allocator.errors,
        "num_sync_all_streams": allocator.retries,
        "num_device_alloc": found["segment"]["all"]["allocated"],
        "num_device_free": found["segment"]["all"]["freed"],
    }


def snapshot(allocators: Iterable, live: Iterable, history) -> dict:
    """What ``torch.cuda.memory._snapshot`` gives: every segment's blocks, and what happened.

    ``live``: card, block and the operator that made it, of all blocks in use. Where ``history``
    has no frames of a block's maker, the operator stands for them.
    """
    frames = {
        block: history.frames.get((card, block.address))
        or [{"name": name, "filename": "", "line": 0}]
        for card, block, name in live
    }
    used = [(card, block) for card, block, _ in live]
    segments = []
    for allocator in allocators:
        own = [block for card, block in used if card == allocator.index] + allocator.cached()
        starts = {_first(block) for block in own}
        for block in sorted(starts, key=lambda start: start.address):
            segments.append(_segment(allocator.index, block, frames))
    return {"segments": segments, "device_traces": [list(each) for each in history.events]}


def _first(block):
    while block.before is not None and block.before.mapped:
        block = block.before
    return block


def _segment(device: int, block, frames: dict) -> dict:
    start, blocks = block, []
    while block is not None and block.mapped:
        blocks.append(
            {
                "address": block.address,
                "size": block.size,
                "requested_size": block.requested,
                "state": "inactive" if block.free else "active_allocated",
                "frames": frames.get(block, []),
            }
        )
        block = block.after
    used = sum(each["size"] for each in blocks if each["state"] != "inactive")
    return {
        "device": device,
        "address": start.address,
        "total_size": sum(each["size"] for each in blocks),
        "allocated_size": used,
        "active_size": used,
        "requested_size": sum(each["requested_size"] for each in blocks),
        "stream": start.pool.stream,
        "segment_type": "small" if start.pool.small else "large",
        "segment_pool_id": (start.pool.graph, 0),
        "is_expandable": False,
        "frames": [],
        "blocks": blocks,
    }
