"""CUDA graphs on simulated cards: what is recorded is whose memory is taken and what is written.

While a graph is captured nothing is computed: numbers of tensors that are written are not known
from then on, and again after each launch. What the driver takes for a graph itself is outside
PyTorch's allocator and not counted; nor are, since PyTorch 2.13, seed and offset of random numbers
that a graph draws, 1 KiB a graph.

Source of the rules: aten/src/ATen/cuda/CUDAGraph.cpp, CUDAGeneratorImpl.cpp of PyTorch 2.11 and the
header of 2.13, Copy.cu. ``torch.cuda.graph`` is PyTorch's own.
"""

import itertools
import weakref

import torch
from packaging.version import Version

from simgpu.device import current, on_card
from simgpu.numbers import Known, is_small
from simgpu.streams import stream_now

# Before, every graph has the card's own generator, whose seed and offset the first one puts there;
# so 2.11, and 2.12 is taken to.
SEEDS_WHEN_DRAWN = Version("2.13")
_ATEN = torch.ops.aten
_WAITING = {
    f"aten::{name}"
    for name in ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "bincount")
}
_pools = itertools.count(1)


class Capture:
    """What is written while a graph is captured: of ``numbers`` that rest on it none are known.

    ``card`` and ``stream`` are where it is captured.
    """

    def __init__(self, card: int, stream: int):
        self.card, self.stream = card, stream
        self._storages: list[list[bool]] = []
        self._choices: list[str] = []

    @property
    def is_here(self) -> bool:
        """Whether it is this thread's present stream that is captured."""
        return stream_now(self.card) == self.stream

    def check(self, func, args: tuple, kwargs: dict):
        """Refuse what makes the CPU wait for the card, as CUDA and PyTorch do."""
        if func in (_ATEN.copy_.default, _ATEN._to_copy.default):
            target, source = args[:2] if func is _ATEN.copy_.default else (None, args[0])
            place = kwargs.get("device") or (source if target is None else target).device
            crosses = on_card(source) == (place.type == "cpu")
            host = target if on_card(source) else source
            if crosses and (host is None or not host.is_pinned()):
                raise RuntimeError(
                    "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the"
                    " CPU tensor is pinned. Please use tensor.pin_memory() or allocate the tensor"
                    " with pin_memory=True."
                )
        elif func._schema.name in _WAITING:
            raise RuntimeError(
                "CUDA error: operation not permitted when stream is capturing"
                f" ({func._schema.name.removeprefix('aten::')} waits for the card). Do it before"
                " the capture, or leave it out."
            )

    def writes(self, tensors: list):
        """An operator of the graph writes into these."""
        for each in tensors:
            if each.known is None and is_small(each):
                each.known = Known(torch.empty(each.shape, dtype=each.dtype), [False])
            if each.known is not None:
                each.known.storage[0] = False
                self._storages.append(each.known.storage)

    def chooses(self, name: str):
        """An operator of the graph chooses a token, which is assumed at every launch."""
        self._choices.append(name)

    def replay(self, note):
        """The graph is launched; ``note`` is called with each assumption."""
        for storage in self._storages:
            storage[0] = False
        for name in self._choices:
            note(name)


class _Seeds:
    """The seed and the offset of a card's random numbers, as long as one of its graphs is there."""

    def __init__(self):
        self.tensors = [torch.empty(1, dtype=torch.int64, device="cuda") for _ in range(2)]


class CUDAGraph:
    """Stands for ``torch.cuda.CUDAGraph`` on the cards of ``rig``; ``seeds`` are by card."""

    rig = None
    seeds: weakref.WeakValueDictionary

    def __init__(self, keep_graph: bool = False):
        self._capture = self._token = self._seeds = None
        self._captured = False

    def capture_begin(self, pool=None, capture_error_mode: str = "global", **options):
        """As PyTorch's; without a pool of another's it makes its own."""
        if self._captured:
            raise RuntimeError(
                "This CUDAGraph instance already owns a captured graph. To capture a new graph,"
                " create a new instance."
            )
        capture = Capture(current.index, stream_now(current.index))
        if Version(torch.__version__) < SEEDS_WHEN_DRAWN:
            self._seeds = self.seeds[capture.card] = self.seeds.get(capture.card) or _Seeds()
        if capture.stream == 0:
            raise RuntimeError(
                "CUDA graphs must be captured on a non-default stream. (However, after capture,"
                " it's ok to replay them on the default stream.)"
            )
        self._token = (next(_pools), 0) if pool is None else pool
        self.rig.allocators[capture.card].begin_capture(max(self._token))
        self._capture = self.rig.numbers.capture = capture

    def capture_end(self):
        """As PyTorch's."""
        if self._capture is None or self._capture is not self.rig.numbers.capture:
            raise RuntimeError("capture_end() called before capture_begin().")
        if not self._capture.is_here:
            raise RuntimeError("Capture must end on the same stream it began on.")
        self.rig.allocators[self._capture.card].end_capture()
        self.rig.numbers.capture = None
        self._captured = True

    def replay(self):
        """Nothing is computed: what the graph writes is not known any more."""
        if not self._captured:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        self._capture.replay(self.rig.numbers.note)

    def instantiate(self):
        """It is, from the end of its capture."""

    def pool(self) -> tuple[int, int]:
        """What another graph's capture may be given, to share this one's memory."""
        if not self._captured:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return self._token

    def reset(self):
        """Let the pool go; the driver may have its memory back when no other graph has it."""
        if self._captured:
            self.rig.allocators[self._capture.card].release_pool(max(self._token))
        self._captured, self._seeds = False, None

    def __del__(self):
        self.reset()


def names(rig) -> dict:
    """What ``torch.cuda`` has of graphs, for a rig's cards."""
    own = {"rig": rig, "seeds": weakref.WeakValueDictionary()}
    return {
        "CUDAGraph": type("CUDAGraph", (CUDAGraph,), own),
        "graph_pool_handle": lambda: (0, next(_pools)),
    }
