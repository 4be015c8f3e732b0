"""NVIDIA's management library (NVML): what the driver knows of the cards, also of other processes.

By it nothing is taken of a card, where CUDA would make a context of half a gigabyte first.
"""

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
    with suppress(NVMLError):
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    return None


def memory_of(handle):
    """``total``, ``used`` and ``free`` bytes of a card, as nvidia-smi shows them.

    The driver's own reserve is not in ``used``; drivers before 510 count it in.
    """
    try:
        return pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    except (pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_NotSupported):
        return pynvml.nvmlDeviceGetMemoryInfo(handle)


def processes_on(handle) -> list[tuple[int, int | None]] | None:
    """Process id and bytes, where they are known, of all who compute on a card.

    None where the driver does not tell. In a container the ids may be those of the host.
    """
    try:
        found = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission):
        return None
    return [(process.pid, process.usedGpuMemory) for process in found]
