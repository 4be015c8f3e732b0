"""NVIDIA's management library (NVML): what the driver knows of the cards, also of other processes.

By it nothing is taken of a card, where CUDA would make a context of half a gigabyte first.
"""

from collections.abc import Callable
from contextlib import contextmanager, suppress

import pynvml
from pynvml import NVMLError


@contextmanager
def nvml():
    """Around calls of this module and of ``pynvml``; blocks may lie in one another.

    Raises:
        NVMLError: there is no NVIDIA driver here.
    """
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def asked(query: Callable, *arguments, **options):
    """What a query of ``pynvml`` answers; None where the driver refuses this one, as it does some
    for slices of a card (MIG), under WSL, or without permission."""
    with suppress(NVMLError):
        return query(*arguments, **options)
    return None


def card_count() -> int:
    """How many cards the driver has, also those hidden from CUDA; 0 without a driver."""
    with suppress(NVMLError), nvml():
        return pynvml.nvmlDeviceGetCount()
    return 0


def driver_version() -> str | None:
    """Of the NVIDIA driver, as "580.159.04"; None without one."""
    with suppress(NVMLError), nvml():
        return pynvml.nvmlSystemGetDriverVersion()
    return None


def handle_of(uuid):
    """NVML's handle of a card by the UUID that CUDA gives; None for a slice of a card (MIG).

    By UUID and not by number: CUDA_VISIBLE_DEVICES renumbers what PyTorch sees, not what NVML sees.
    """
    return asked(pynvml.nvmlDeviceGetHandleByUUID, f"GPU-{uuid}")


def memory_of(handle):
    """``total``, ``used`` and ``free`` bytes of a card, as nvidia-smi shows them, or None.

    The driver's own reserve is not in ``used``; drivers before 510 count it in.
    """
    query = pynvml.nvmlDeviceGetMemoryInfo
    return asked(query, handle, version=pynvml.nvmlMemory_v2) or asked(query, handle)


def processes_on(handle) -> list[tuple[int, int | None]] | None:
    """Process id and bytes, where they are known, of all who compute on a card.

    None where the driver does not tell. In a container the ids may be those of the host.
    """
    found = asked(pynvml.nvmlDeviceGetComputeRunningProcesses, handle)
    return found and [(process.pid, process.usedGpuMemory) for process in found]
