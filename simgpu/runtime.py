"""The functions that ``torch.cuda`` and ``torch.accelerator`` call at their bottom, for a rig.

All that PyTorch offers in Python is built of these, so that it gives one answer everywhere.
"""

from types import SimpleNamespace

import torch

from simgpu.catalog import Card
from simgpu.device import check_ordinal, current
from simgpu.memory_stats import memory_stats
from simgpu.streams import Stream, set_stream, stream_data, stream_now

CUDA_VERSION = 13000  # of the PyTorch whose memory was measured


def _nothing(*arguments, **options):
    """What has no meaning where nothing is computed."""


class Runtime:
    """CUDA's state of this process, as far as memory goes, with ``rig``'s cards for devices."""

    def __init__(self, rig):
        self._rig = rig

    def functions(self) -> dict:
        """The functions of ``torch._C`` by name."""
        cuda = {
            "init": _nothing,
            "getDeviceCount": self._count,
            "getDevice": self._get_device,
            "setDevice": self._exchange_device,
            "exchangeDevice": self._exchange_device,
            "maybeExchangeDevice": self._exchange_device,
            "synchronize": _nothing,
            "canDeviceAccessPeer": lambda device, peer: True,
            "hasPrimaryContext": lambda device: True,
            "isCurrentStreamCapturing": lambda: self._rig.is_capturing(current.index),
            "setStream": set_stream,
            "getCurrentStream": lambda device: stream_data(stream_now(device), device),
            "getDefaultStream": lambda device: stream_data(0, device),
            "getCurrentRawStream": stream_now,
            "getCompiledVersion": lambda: CUDA_VERSION,
            "getArchFlags": self._architectures,
            "ipc_collect": _nothing,
            "get_sync_debug_mode": lambda: 0,
            "set_sync_debug_mode": _nothing,
            "clearCublasWorkspaces": self._rig.release_workspaces,
            "getAllocatorBackend": lambda: "native",
            "emptyCache": self._empty_cache,
            "memoryStats": self._statistics,
            "resetPeakMemoryStats": lambda device: self._allocator(device).reset_peaks(),
            "resetAccumulatedMemoryStats": lambda device: self._allocator(device).reset_totals(),
            "hostMemoryStats": dict,
            "resetPeakHostMemoryStats": _nothing,
            "resetAccumulatedHostMemoryStats": _nothing,
            "memorySnapshot": lambda pool=None, *more: self._rig.snapshot(),
            "record_memory_history": self._rig.record_history,
            "record_memory_history_legacy": lambda enabled, *rest: self._rig.record_history(
                "all" if enabled else None
            ),
            "setMemoryFraction": self._set_fraction,
            "getMemoryFraction": self._fraction,
        }
        accelerator = {
            "getAccelerator": lambda: torch.device("cuda"),
            "getDeviceIndex": self._get_device,
            "setDeviceIndex": self._exchange_device,
            "exchangeDevice": self._exchange_device,
            "maybeExchangeDevice": self._exchange_device,
            "getStream": lambda device: Stream(device, stream_id=stream_now(device)),
            "setStream": lambda stream: set_stream(stream.stream_id, stream.device_index),
            "synchronizeDevice": _nothing,
            "isAllocatorInitialized": lambda: True,
            "emptyCache": self._empty_cache,
            "emptyHostCache": _nothing,
            "getDeviceStats": self._statistics,
            "resetPeakStats": cuda["resetPeakMemoryStats"],
            "resetAccumulatedStats": cuda["resetAccumulatedMemoryStats"],
            "getMemoryInfo": self._memory_info,
        }
        parallel = {
            "_broadcast": lambda tensor, devices: [tensor.to(f"cuda:{each}") for each in devices],
            "_broadcast_coalesced": _broadcast_coalesced,
            "_scatter": _scatter,
            "_gather": _gather,
            "_host_emptyCache": _nothing,
        }
        return (
            {f"_cuda_{name}": function for name, function in cuda.items()}
            | {f"_accelerator_{name}": function for name, function in accelerator.items()}
            | parallel
        )

    def names(self) -> dict:
        """What ``torch.cuda`` has beside them, or remembers of the machine itself."""
        cudart = SimpleNamespace(cudaMemGetInfo=self._memory_info)
        return {
            "_initialized": True,
            "_cached_device_count": None,
            "_device_count_nvml": lambda: -1,
            "_exchange_device": self._exchange_device,
            "_maybe_exchange_device": self._exchange_device,
            "_cudart": cudart,
            "cudart": lambda: cudart,
            "_get_device_properties": self._properties,
            "get_device_name": lambda device=None: torch.cuda.get_device_properties(device).name,
            "is_bf16_supported": self._is_bf16_supported,
            "default_generators": tuple(torch.Generator() for _ in self._rig.cards),
            "mem_get_info": self._mem_get_info,
        } | self._rig.graphs

    def _allocator(self, device: int):
        check_ordinal(device, len(self._rig.allocators))
        return self._rig.allocators[device]

    def _count(self) -> int:
        return len(self._rig.cards)

    def _get_device(self) -> int:
        return current.index

    def _exchange_device(self, device: int) -> int:
        before = current.index
        if device >= 0:
            check_ordinal(device, self._count())
            current.index = device
        return before

    def _empty_cache(self):
        for allocator in self._rig.allocators:
            allocator.empty_cache()

    def _statistics(self, device: int) -> dict:
        return memory_stats(self._allocator(device))

    def _memory_info(self, device: int) -> tuple[int, int]:
        allocator = self._allocator(device)
        return allocator.free_bytes, allocator.total_bytes

    def _mem_get_info(self, device=None) -> tuple[int, int]:
        return self._memory_info(torch.cuda._utils._get_device_index(device, optional=True))

    def _fraction(self, device: int) -> float:
        fraction = self._allocator(device).fraction
        return 1.0 if fraction is None else fraction

    def _set_fraction(self, fraction: float, device: int):
        self._allocator(device).fraction = fraction

    def _architectures(self) -> str:
        found = {"sm_{}{}".format(*card.compute_capability): None for card in self._rig.cards}
        return " ".join(found)

    def _is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return including_emulation or self._rig.cards[current.index].bf16_supported

    def _properties(self, device: int) -> SimpleNamespace:
        check_ordinal(device, self._count())
        card: Card = self._rig.cards[device]
        major, minor = card.compute_capability
        return SimpleNamespace(
            name=card.device_name,
            total_memory=card.total_bytes,
            major=major,
            minor=minor,
            multi_processor_count=card.multiprocessors,
        )


def _broadcast_coalesced(tensors, devices, buffer_size):
    return [[tensor.to(f"cuda:{device}") for tensor in tensors] for device in devices]


def _scatter(tensor, devices, chunk_sizes, dim, streams):
    chunks = tensor.split(chunk_sizes, dim) if chunk_sizes else tensor.chunk(len(devices), dim)
    return tuple(chunk.to(f"cuda:{each}") for chunk, each in zip(chunks, devices, strict=False))


def _gather(tensors, dim, destination):
    place = "cpu" if destination == -1 else f"cuda:{destination or 0}"
    return torch.cat([tensor.to(place) for tensor in tensors], dim)
