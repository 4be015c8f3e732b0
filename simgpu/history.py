"""What the allocators did and which line of the program asked for it, for PyTorch's memory viewer.

Actions, and which size each of them has, are those of ``record_trace`` in
c10/cuda/CUDACachingAllocator.cpp of PyTorch 2.11 to 2.13.
"""

import functools
import sys
import time
from collections import deque
from pathlib import Path

import torch

_HERE, _TORCH = Path(__file__).parent, Path(torch.__file__).parent
_BELOW = tuple(
    str(_TORCH / name)
    for name in ("_subclasses", "_dynamo", "_compile.py", "_ops.py", "utils/_stats.py")
)


@functools.cache
def is_below_operators(file: str) -> bool:
    """Whether a file's functions run below an operator of PyTorch on simulated cards alone."""
    return Path(file).parent == _HERE or file.startswith(_BELOW)


class History:
    """Events of every card while ``torch.cuda.memory._record_memory_history`` has switched it on.

    ``events`` has a list per card of what PyTorch's snapshots call trace entries, ``frames`` those
    of the program by card and address of a block in use.
    """

    def __init__(self, allocators):
        self._allocators = allocators
        self._with_frames = True
        self.record(None)

    def record(self, enabled, context="all", stacks="all", most=sys.maxsize, clear=False, *others):
        """Arguments as of ``torch._C._cuda_record_memory_history``."""
        if not enabled or clear or not hasattr(self, "events"):
            self.events: list[deque] = [deque() for _ in self._allocators]
            self.frames: dict[tuple[int, int], list[dict]] = {}
        most = 1 if enabled == "state" else most
        self.events = [deque(each, maxlen=min(most, sys.maxsize)) for each in self.events]
        self._with_frames = context is not None
        for allocator in self._allocators:
            allocator.trace = self._note if enabled else None

    def _note(self, card: int, action: str, address: int, size: int, pool):
        frames = self._stack() if self._with_frames else []
        key = "device_free" if action == "oom" else "addr"
        event = {"action": action, key: address, "size": size, "frames": frames}
        event |= {"stream": pool.stream, "pool_id": (pool.graph, 0)}
        event["time_us"] = time.time_ns() // 1000
        self.events[card].append(event)
        if action == "alloc":
            self.frames[card, address] = frames
        elif action == "free_requested":
            self.frames.pop((card, address), None)

    def _stack(self) -> list[dict]:
        frames, frame = [], sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            file = code.co_filename
            if not is_below_operators(file):
                frames.append({"name": code.co_name, "filename": file, "line": frame.f_lineno})
            frame = frame.f_back
        return frames
