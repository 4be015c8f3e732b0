"""What can be known about every card at a moment, for the monitor; cheap.

Both classes give one dictionary per card: the fields of ``CardMemory``, then what the allocated
bytes are for (``weights_bytes``, ``kv_cache_bytes``, ``workspace_bytes``, ``activations_bytes``;
they sum to ``allocated_bytes``, and what belongs to training, gradients and optimiser state, is
among the last), then the card as the driver sees it (``used_bytes`` by everyone, ``own_bytes`` by
this process, ``others_bytes``). None stands for what cannot be known.
"""

import os
import weakref
from collections import Counter
from contextlib import ExitStack, suppress

import torch

from simgpu.nvml import NVMLError, handle_of, memory_of, nvml, processes_on
from simgpu.purposes import KV_CACHE, WEIGHTS, WORKSPACE, split


class SimulatedReadings:
    """Simulated cards: every block says what it is for; all is weights in a stage "load"."""

    def __init__(self, rig):
        self.rig = rig

    def close(self):
        """Nothing was opened."""

    def read(self) -> list[dict]:
        found = []
        for memory in self.rig.memory():
            sizes = Counter()
            for block in self.rig.blocks(memory.index):
                sizes[block.purpose] += block.bytes
            if "load" in self.rig.running:
                sizes = Counter({WEIGHTS: memory.allocated_bytes})
            parts = (sizes[WEIGHTS], sizes[KV_CACHE], sizes[WORKSPACE])
            used = memory.capacity_bytes - memory.free_bytes
            # Nobody else is on a simulated card.
            driver = {"used_bytes": used, "own_bytes": used, "others_bytes": 0}
            found.append(memory.to_dict() | split(memory.allocated_bytes, *parts) | driver)
        return found


class MachineReadings:
    """This machine's GPUs, or its host memory where there are none.

    No CUDA context is made on a card that this process has not used: that alone would take half a
    gigabyte of it. ``weights_bytes`` is what was allocated when the last stage named "load" ended;
    the KV cache is known if it was given, the workspace never. NVML tells this process from others
    only where it lists process ids of this machine's own numbering, which in a container it may
    not. ``cache`` is transformers' KV cache, or None; it is not kept alive.
    """

    def __init__(self, rig, cache=None):
        self.rig = rig
        self.cache = weakref.ref(cache) if cache is not None else lambda: None
        self._listed = False  # whether NVML has ever listed this process
        self._handles: list = []
        self._open = ExitStack()
        if torch.cuda.is_available():
            with suppress(NVMLError):
                self._open.enter_context(nvml())
                for index in range(len(rig.devices)):
                    self._handles.append(handle_of(torch.cuda.get_device_properties(index).uuid))

    def close(self):
        """Let go of NVML."""
        self._open.close()

    def read(self) -> list[dict]:
        kv_cache = cache_bytes(self.cache())
        if not torch.cuda.is_available():
            host = self.rig.memory()[0].to_dict()
            used, own = host["capacity_bytes"] - host["free_bytes"], host["allocated_bytes"]
            driver = {"used_bytes": used, "own_bytes": own, "others_bytes": max(0, used - own)}
            return [host | split(own, self._weights(0, own), sum(kv_cache.values()), None) | driver]
        found = []
        for index, (name, capacity) in enumerate(self.rig.devices):
            figures = _allocator_figures(index)
            allocated = figures["allocated_bytes"]
            found.append(
                {"index": index, "card": name, "capacity_bytes": capacity}
                | figures
                | split(allocated, self._weights(index, allocated), kv_cache[index], None)
                | self._driver_figures(index, capacity)
            )
        return found

    def _weights(self, index: int, allocated: int) -> int:
        """Allocated bytes at the end of the last load; all of them while a load is running."""
        loads = [stage for stage in self.rig.stages if stage.name == "load"]
        if not loads:
            return 0
        return loads[-1].memory[index].allocated_bytes if loads[-1].memory else allocated

    def _driver_figures(self, index: int, capacity: int) -> dict[str, int | None]:
        """The card by NVML; without it by CUDA, if this process has a context, and no processes."""
        handle = self._handles[index] if self._handles else None
        memory = memory_of(handle) if handle is not None else None
        free = used = own = others = None
        if memory is not None:
            used, own = memory.used, self._own_bytes(handle)
            free = max(0, min(memory.free, capacity - used))
            others = None if own is None else max(0, used - own)
        elif torch.cuda.is_initialized():
            free, total = torch.cuda.mem_get_info(index)
            used = total - free
        return {"free_bytes": free, "used_bytes": used, "own_bytes": own, "others_bytes": others}

    def _own_bytes(self, handle) -> int | None:
        processes = processes_on(handle)
        mine = [size for pid, size in processes or () if pid == os.getpid()]
        self._listed = self._listed or bool(mine)
        known = processes is not None and self._listed and None not in mine
        return sum(mine) if known else None


def cache_bytes(cache) -> Counter[int]:
    """Bytes of a KV cache by index of its tensors' device (0 for the CPU); none without a cache."""
    found = Counter()
    for layer in getattr(cache, "layers", ()):
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if tensor is not None:
                found[tensor.device.index or 0] += tensor.nbytes
    return found


def _allocator_figures(index: int) -> dict[str, int]:
    # The public functions ask for this dictionary once a figure: ten times slower.
    statistics = {}
    if torch.cuda.is_initialized():
        statistics = torch.cuda.memory_stats_as_nested_dict(index)
    return {
        f"{prefix}{name}_bytes": statistics.get(f"{name}_bytes", {}).get("all", {}).get(key, 0)
        for name in ("allocated", "reserved")
        for prefix, key in (("", "current"), ("peak_", "peak"))
    }
