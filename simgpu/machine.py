"""``MachineRig``: this machine's own devices behind the interface of ``Rig``."""

import platform
import time
from collections import Counter

import psutil
import torch
import transformers

from simgpu.rig import CardMemory, Rig


def measured_on(gpus: int, remark: str = "") -> str:
    """ "measured on ...": the first ``gpus`` GPUs, or the CPU if 0, a remark, date and versions."""
    if gpus:
        names = Counter(torch.cuda.get_device_name(index) for index in range(gpus))
        where = ", ".join(f"{count} x {name}" for name, count in names.items())
    else:
        where = f"CPU ({platform.machine()}, {psutil.cpu_count()} cores)"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"measured on {where}{remark}, {time.strftime('%Y-%m-%d')}, {versions}"


class MachineRig(Rig):
    """This machine's GPUs as they are, or its CPU and host memory where there are none.

    A ``with`` block changes nothing. Host memory has no peak counter that can be reset: a stage's
    peak is the larger of its begin and its end.
    """

    _host_peak = 0

    @property
    def provenance(self) -> str:
        """ "measured on ...", with device, date and versions."""
        return measured_on(torch.cuda.device_count() if torch.cuda.is_available() else 0)

    def __repr__(self):
        return f"{type(self).__name__}({self.provenance})"

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def _build_world(self, stack):
        pass

    @property
    def devices(self) -> list[tuple[str, int]]:
        """Name and capacity in bytes of every GPU; empty where there is none."""
        if not torch.cuda.is_available():
            return []
        found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        return [(properties.name, properties.total_memory) for properties in found]

    def memory(self) -> list[CardMemory]:
        """Every GPU's memory now, or the host's where there is none, whose card is "host"."""
        if not torch.cuda.is_available():
            return [self._host_memory()]
        return [
            CardMemory(
                index=index,
                card=name,
                capacity_bytes=capacity,
                allocated_bytes=torch.cuda.memory_allocated(index),
                reserved_bytes=torch.cuda.memory_reserved(index),
                peak_allocated_bytes=torch.cuda.max_memory_allocated(index),
                peak_reserved_bytes=torch.cuda.max_memory_reserved(index),
                free_bytes=self._free_bytes(index),
            )
            for index, (name, capacity) in enumerate(self.devices)
        ]

    def _free_bytes(self, index: int) -> int:
        return torch.cuda.mem_get_info(index)[0]

    def _host_memory(self) -> CardMemory:
        host, resident = psutil.virtual_memory(), psutil.Process().memory_info().rss
        self._host_peak = max(self._host_peak, resident)
        own = (resident, resident, self._host_peak, self._host_peak)
        return CardMemory(0, "host", host.total, *own, host.available)

    def _reset_peaks(self):
        self._host_peak = 0
        self.memory()
        for index in range(len(self.devices)):
            torch.cuda.reset_peak_memory_stats(index)
