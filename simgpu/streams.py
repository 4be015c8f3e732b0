"""Streams, events and random generators of simulated cards: nothing waits, and no time passes."""

from contextlib import nullcontext

import torch

from simgpu.device import fake_mode

NAMES = ("Stream", "ExternalStream", "Event", "current_stream", "default_stream", "stream")
_Generator = torch.Generator


class Stream:
    """Stands for ``torch.cuda.Stream``; everything is done in the order in which it is called."""

    def __init__(self, device=None, priority: int = 0, **options):
        self.device, self.priority, self.cuda_stream = device, priority, 0

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def synchronize(self):
        pass

    def wait_event(self, event: "Event"):
        pass

    def wait_stream(self, stream: "Stream"):
        pass

    def record_event(self, event: "Event | None" = None) -> "Event":
        return event or Event()


ExternalStream = Stream
_default = Stream()


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
        raise RuntimeError(
            "elapsed_time() asks how long work on a card took, and simulated cards do no work: they"
            " count bytes. Measure time on a real device."
        )


def current_stream(device=None) -> Stream:
    return _default


def default_stream(device=None) -> Stream:
    return _default


def stream(stream: Stream | None = None):
    return nullcontext()


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
