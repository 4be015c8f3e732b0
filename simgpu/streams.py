"""Streams, events and random generators of simulated cards: nothing waits, and no time passes.

What a stream takes is no other's (``allocator``), so each has a number, and each thread a present
one on every card.
"""

import itertools
from collections import defaultdict

import torch

from simgpu.device import current, fake_mode

NAMES = ("Stream", "ExternalStream", "Event")
# A card has so many streams of a priority; who makes more gets the first again (CUDAStream.cpp).
PER_PRIORITY = 32
_made: defaultdict[tuple[int, int], itertools.count] = defaultdict(itertools.count)
_Generator = torch.Generator


class NoTimeError(RuntimeError):
    """Somebody asked how long something took on a simulated card."""


class Stream:
    """Stands for ``torch.cuda.Stream``; everything is done in the order in which it is called."""

    device_type = 1  # of CUDA

    def __init__(
        self,
        device=None,
        priority: int = 0,
        *,
        stream_id: int | None = None,
        device_index: int | None = None,
        **options,
    ):
        if device_index is None:
            device_index = torch.cuda._utils._get_device_index(device, optional=True)
        if stream_id is None:
            level = PER_PRIORITY * min(max(0, -priority), 3)
            stream_id = level + 1 + next(_made[device_index, level]) % PER_PRIORITY
        self.device, self.device_index = torch.device("cuda", device_index), device_index
        self.priority, self.stream_id, self.cuda_stream = priority, stream_id, stream_id

    def __eq__(self, other) -> bool:
        own = (self.device_index, self.stream_id)
        return isinstance(other, Stream) and own == (other.device_index, other.stream_id)

    def __hash__(self) -> int:
        return hash((self.device_index, self.stream_id))

    def __enter__(self):
        self._context = torch.cuda.stream(self)
        self._context.__enter__()
        return self

    def __exit__(self, *exception):
        self._context.__exit__(*exception)

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        with self:
            return torch.cuda.is_current_stream_capturing()

    def synchronize(self):
        pass

    def wait_event(self, event: "Event"):
        pass

    def wait_stream(self, stream: "Stream"):
        pass

    def record_event(self, event: "Event | None" = None) -> "Event":
        return event or Event()


class ExternalStream(Stream):
    """Stands for a stream that another library has made."""

    def __init__(self, stream_ptr: int, device=None, **options):
        super().__init__(device, stream_id=stream_ptr)


class Event:
    """Stands for ``torch.cuda.Event``."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, **options):
        pass

    def record(self, stream: Stream | None = None):
        pass

    def wait(self, stream: Stream | None = None):
        pass

    def query(self) -> bool:
        return True

    def synchronize(self):
        pass

    def elapsed_time(self, end_event: "Event") -> float:
        raise NoTimeError(
            "elapsed_time() asks how long work on a card took, and simulated cards do no work: they"
            " count bytes. Measure time on a real device."
        )


def stream_now(card: int) -> int:
    """The number of this thread's present stream on a card; 0 is the default one."""
    return current.streams.get(card, 0)


def set_stream(stream_id: int, device_index: int, device_type: int = Stream.device_type):
    """As ``torch._C._cuda_setStream``."""
    current.index = device_index
    current.streams[device_index] = stream_id


def stream_data(stream_id: int, card: int) -> tuple[int, int, int]:
    """A stream as ``torch._C._cuda_getCurrentStream`` gives it."""
    return stream_id, card, Stream.device_type


class NVTX:
    """Stands for what marks ranges of a program for NVIDIA's profilers: nobody looks."""

    rangePushA = rangeStartA = staticmethod(lambda message: 0)
    rangePop = staticmethod(lambda: 0)
    rangeEnd = markA = staticmethod(lambda argument: None)


class Generator(_Generator):
    """``torch.Generator`` that may be one of a card; there its numbers are drawn by none."""

    def __new__(cls, device="cpu"):
        place = torch.device(device)
        self = super().__new__(cls, "cpu" if place.type == "cuda" else place)
        self._place = place
        return self

    @property
    def device(self) -> torch.device:
        return self._place


def pin_memory(tensor: torch.Tensor, device=None) -> torch.Tensor:
    """A copy that says it is pinned; to the cards that makes no difference."""
    pinned = tensor.clone()
    pinned._is_pinned = True
    return pinned


def pinnable(original, *args, pin_memory: bool = False, **kwargs) -> torch.Tensor:
    """A factory of PyTorch; what is pinned is there to take what comes from a card, so it may do
    without numbers."""
    if not pin_memory:
        return original(*args, **kwargs)
    with fake_mode():
        made = original(*args, **kwargs)
    made._is_pinned = True
    return made


def is_pinned(tensor: torch.Tensor, device=None) -> bool:
    return getattr(tensor, "_is_pinned", False)
