"""The host's memory (RAM) while a model is loaded: what must be there, and what is only mapped.

Read in the sources of torch 2.13, transformers 5.23, safetensors 0.8 and accelerate 1.15:

- safetensors maps a whole file (``UntypedStorage.from_file``, a private mapping), and a tensor is a
  view of it. Its pages come from the file when something reads them. They stay until the last view
  of that file is gone; the loader keeps all files until it ends.
- ``tensor.to("cpu", dtype)`` with the dtype it has gives the view itself. Such a weight takes no
  memory of its own, and loading does not even read it. accelerate's hooks keep that view for a
  module offloaded to the CPU.
- ``.to("cpu", another dtype)`` makes a copy in anonymous memory, which stays.
- ``.to("cuda", the same dtype)`` copies out of the mapped pages. With another dtype PyTorch
  converts on the host first (``copy_kernel_cuda`` in aten/src/ATen/native/cuda/Copy.cu): a copy in
  anonymous memory that is gone when it returns.
- A pool of threads does this, each one tensor at a time (``GLOBAL_WORKERS`` in
  transformers/core_model_loading.py).

Not counted: Python with its objects, the libraries and the CUDA context, the driver's staging
buffers, and the first page of every tensor, which making a view reads.
"""

import heapq
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

# transformers takes fewer on a machine with fewer cores.
LOADER_THREADS = 4


@dataclass(frozen=True)
class HostMemory:
    """Host memory that a load takes beside the process itself; all figures in bytes.

    Anonymous memory has to be there: the kernel cannot drop it, and its OOM killer counts it. Pages
    of a mapped file can be dropped at any time and read again.

    Attributes:
        peak_anonymous_bytes: the most at a time, if every thread of the loader converts one of the
            largest tensors at once. Which tensors meet is a race: this is an upper bound.
        sequential_peak_anonymous_bytes: the same with one thread (``HF_DEACTIVATE_ASYNC_LOAD=1``);
            a lower bound for more.
        anonymous_bytes: after the load.
        peak_file_bytes: what the load reads from the files, whose pages stay mapped until it ends.
        file_bytes: of these, what is still mapped after it: the read pages of every file that some
            weight is a view of.
        view_bytes: weights that are views of the files after the load, read by the first forward
            pass, and where memory is short by every one.
    """

    peak_anonymous_bytes: int
    sequential_peak_anonymous_bytes: int
    anonymous_bytes: int
    peak_file_bytes: int
    file_bytes: int
    view_bytes: int


class _Load:
    """The tensors of one load: those mapped from files, and those the loader makes on the CPU."""

    def __init__(self, tensors: dict[str, torch.Tensor], files: dict[str, str]):
        # By storage, while it lives, its bytes; of a mapped one also its file.
        self.mapped, self.made = WeakIdKeyDictionary(), WeakIdKeyDictionary()
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            self.mapped[storage] = storage.nbytes(), files.get(name, "")
        self.unread = self.mapped.copy()
        self.read: Counter[str] = Counter()  # bytes by file
        self.conversions: list[int] = []  # bytes of each on the way to a card
        self.peak = self.sequential_peak = 0

    def observe(self, results: list[FakeTensor], arguments: tuple):
        """Count what an operator made: a tensor on the CPU, or a conversion before a copy."""
        fake = (each for each in arguments if isinstance(each, FakeTensor))
        source = next((each for each in fake if each.device.type == "cpu"), None)
        for tensor in results:
            storage = tensor.untyped_storage()
            if tensor.device.type == "cpu":
                if storage in self.mapped or storage in self.made:
                    continue  # a view
                self.made[storage] = storage.nbytes()
                self._reach(0)
            elif source is not None and source.dtype != tensor.dtype:
                self.conversions.append(tensor.nbytes)
                self._reach(tensor.nbytes)
            if source is not None:
                size, file = self.unread.pop(source.untyped_storage(), (0, ""))
                self.read[file] += size

    def result(self) -> HostMemory:
        """When the loader has returned, and dropped its own references."""
        files_in_use = {file for _, file in self.mapped.values()}
        return HostMemory(
            peak_anonymous_bytes=self.peak + sum(heapq.nlargest(LOADER_THREADS, self.conversions)),
            sequential_peak_anonymous_bytes=self.sequential_peak,
            anonymous_bytes=sum(self.made.values()),
            peak_file_bytes=sum(self.read.values()),
            file_bytes=sum(self.read[file] for file in files_in_use),
            view_bytes=sum(size for size, _ in self.mapped.values()),
        )

    def _reach(self, conversion: int):
        now = sum(self.made.values())
        self.peak = max(self.peak, now)
        self.sequential_peak = max(self.sequential_peak, now + conversion)


class Host:
    """Counts the host memory of every load that a rig's cards take part in."""

    def __init__(self):
        # Of the last load that ended, None before it and after one that failed.
        self.memory: HostMemory | None = None
        self._load: _Load | None = None

    def observe(self, results: list[FakeTensor], arguments: tuple):
        """Count an operator of a load; outside of one nothing is counted."""
        if self._load is not None:
            self._load.observe(results, arguments)

    @contextmanager
    def loading(self):
        """Around the loader, which must have dropped its references when the block ends."""
        self.memory = None
        try:
            yield
            self.memory = self._load.result()
        finally:
            self._load = None

    def map(self, tensors: dict[str, torch.Tensor], files: dict[str, str]) -> dict:
        """Give tensors back, and count from here; those without a file are as of one together."""
        self._load = _Load(tensors, files)
        return tensors
