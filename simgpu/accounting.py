"""Follows every tensor on simulated cards from birth to its last reference, and what it is for."""

import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch

from simgpu import memory_stats, operators, scratch
from simgpu.allocator import Allocator, Block
from simgpu.catalog import Card
from simgpu.device import check_ordinal, on_card
from simgpu.history import History
from simgpu.purposes import ACTIVATIONS, WORKSPACE
from simgpu.replay import Event, Replay


@dataclass(eq=False)
class Allocation:
    """What one storage takes of a card, where it came from and what it is for."""

    card: int
    bytes: int  # the tensor's, rounded up to whole blocks
    shape: tuple[int, ...]
    dtype: torch.dtype
    operator: str
    stage: str
    purpose: str  # of those in ``purposes``
    serial: int  # counts allocations of this process
    places: list[Block] = field(repr=False)  # what the allocator gave; several after a replay
    caller: object = None  # who made it, where somebody wants to know


class Accounting:
    """Charges storages to the allocators of the cards they are on.

    The first matrix product on a stream of a card takes cuBLAS's workspace, and on a card loads its
    kernels; the first of a backward pass, which PyTorch runs in a thread of its own, takes a
    workspace once more.

    ``allocators`` are one per card of ``cards``. ``stage`` is written on what is allocated, and
    what ``caller`` gives; ``at_failure`` is what was on each card when memory ran out last,
    ``history`` what the allocators have done, ``unmodelled`` the operators that may have taken
    memory besides.
    """

    def __init__(self, allocators: list[Allocator], cards: list[Card]):
        self.allocators, self.cards, self.stage = allocators, cards, "other"
        self.caller: Callable[[], object] = lambda: None
        self._passing: list[Allocation] = []  # what is being released, or there for a moment
        self.at_failure: list[list[Allocation]] = []
        self.failures: list[str] = []  # the messages of all out-of-memory errors
        self.history, self.unmodelled = History(allocators), scratch.Unmodelled()
        self._purpose = ACTIVATIONS
        self._live: dict[int, Allocation] = {}  # by address of the storage
        self._references: dict[int, weakref.ref] = {}
        # (workspace, card, whether in the backward pass, stream)
        self._workspaces: dict[tuple[str, int, bool, int], Allocation] = {}
        # Card, and what they are for; of long decodings the sizes of one step.
        self._kernels_loaded: set[tuple[int, str | tuple[int, ...]]] = set()
        self._serials = itertools.count()
        self._recording: list[Event] | None = None
        self._in_backward_pass = False

    def observe(self, operator, results: list[torch.Tensor], *arguments):
        """Charge what an operator newly allocated; where a card has no room, see ``at_failure``.

        ``arguments`` are a tuple of those by place and a dictionary of those by name.
        """
        try:
            self._charge(operator, results, *arguments)
        except torch.OutOfMemoryError as error:
            self._remember_failure(error)
            raise

    def backward_pass(self):
        """What is allocated inside the block is in a backward pass, a thread of its own on CUDA."""
        return mock.patch.object(self, "_in_backward_pass", True)

    def making(self, purpose: str):
        """What is allocated inside the block is for this."""
        return mock.patch.object(self, "_purpose", purpose)

    def register(self, purpose: str, tensors: Iterable[torch.Tensor]):
        """These tensors are for this; those on no card are passed over."""
        for tensor in tensors:
            if on_card(tensor):
                key = tensor.untyped_storage()._cdata
                if key in self._live:
                    self._live[key].purpose = purpose

    def _charge(self, operator, results: list[torch.Tensor], args: tuple, kwargs: dict):
        name, card = operator._schema.name, results[0].device.index
        check_ordinal(card, len(self.cards))
        taken = scratch.scratch(operator, args, kwargs, results, self.cards[card])
        if taken is None or name in scratch.ESTIMATED:
            bound = scratch.bound_bytes(operator, args, kwargs, results)
            if bound != 0:
                self.unmodelled.note(name.removeprefix("aten::"), bound)
        early, late = scratch.early_and_late(taken or [])
        with self._taken(card, early):
            for tensor in operators.in_order(name, results):
                self._charge_storage(operator, tensor)
            with self._taken(card, late):
                pass
        if name == "aten::rsqrt":
            self._load_kernels(card, "normalisation", operators.NORM_KERNELS, 0)
        if name in operators.MATRIX_PRODUCTS:
            size = self.cards[card].cublas_workspace_bytes
            self._charge_workspace("cuBLAS workspace", card, size)
            if name in operators.WITH_BIAS:
                self._charge_workspace(
                    "cublasLt workspace", card, operators.CUBLASLT_WORKSPACE_BYTES
                )

    def _charge_storage(self, operator, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if size <= (self._live[key].bytes if key in self._live else 0):
            return
        self._release(key)  # where the storage was resized in place
        card = tensor.device.index
        name, origin = operator._schema.name.removeprefix("aten::"), (self.stage, self._purpose)
        allocation = self._allocate(card, size, tuple(tensor.shape), tensor.dtype, name, *origin)
        self._live[key] = allocation
        self._references[key] = weakref.ref(storage, lambda _: self._release(key))
        self._note(True, card, size, allocation.serial)

    def blocks(self, card: int) -> list[Allocation]:
        """What is on a card now, largest first."""
        everything = (*self._live.values(), *self._workspaces.values())
        return sorted((each for each in everything if each.card == card), key=lambda e: -e.bytes)

    def everything(self) -> list[Allocation]:
        """What is on all cards, and what is just being released; quick, as it is asked often."""
        return [*self._live.values(), *self._workspaces.values(), *self._passing]

    def snapshot(self) -> dict:
        """Every segment and block, as ``torch.cuda.memory._snapshot`` gives them."""
        everything = (*self._live.values(), *self._workspaces.values())
        live = [(one.card, place, one.operator) for one in everything for place in one.places]
        return memory_stats.snapshot(self.allocators, live, self.history)

    def repeat(self, step, count: int):
        """As ``SimulatedRig.repeat``: run two steps and replay the rest, if they allocate alike."""
        recorded = [self._record(step) for _ in range(min(count, 2))]
        if count <= 2:
            return
        if count >= operators.LONG_DECODE:
            self._load_decode_kernels(recorded[0])
        early, late = (sum(event.allocates for event in events) for events in recorded)
        if early != late:
            for _ in range(count - 2):
                step()
            return
        try:
            Replay(*recorded, self._live.values(), self.allocators).run(count - 2)
        except torch.OutOfMemoryError as error:
            self._remember_failure(error)
            raise

    def _remember_failure(self, error: torch.OutOfMemoryError):
        self.failures.append(str(error))
        self.at_failure = [self.blocks(index) for index in range(len(self.allocators))]

    def _record(self, step) -> list[Event]:
        with mock.patch.object(self, "_recording", []):
            step()
            return self._recording

    def _release(self, key: int):
        self._references.pop(key, None)
        if gone := self._live.pop(key, None):
            self._passing.append(gone)
            self._free(gone)
            self._passing.remove(gone)
            self._note(False, gone.card, gone.bytes, gone.serial)

    def _note(self, *event):
        if self._recording is not None:
            self._recording.append(Event(*event))

    def _allocate(self, card: int, size: int, *description) -> Allocation:
        """``description``: shape, dtype, operator, stage and purpose."""
        place = self._allocator(card).allocate(size)
        serial = next(self._serials)
        return Allocation(card, place.size, *description, serial, [place], self.caller())

    def _free(self, allocation: Allocation):
        for place in allocation.places:
            self._allocator(allocation.card).free(place)

    @contextmanager
    def _taken(self, card: int, sizes: list):
        """Take blocks until the block ends, as a kernel does with its scratch; a list among the
        sizes is taken and given back before what follows."""
        taken: list[tuple[Allocation, int]] = []
        try:
            for size in sizes:
                if isinstance(size, list):
                    with self._taken(card, size):
                        pass
                    continue
                origin = ("scratch", self.stage, WORKSPACE)
                one = self._allocate(card, size, (size,), torch.uint8, *origin)
                taken.append((one, size))
                self._passing.append(one)
                self._note(True, card, size, one.serial)
            yield
        finally:
            for one, size in reversed(taken):
                self._free(one)
                self._passing.remove(one)
                self._note(False, card, size, one.serial)

    def _charge_workspace(self, name: str, card: int, size: int):
        key = (name, card, self._in_backward_pass, self._allocator(card).stream())
        if key in self._workspaces:
            return
        self._load_kernels(
            card, "matrix products", operators.CUBLAS_KERNELS, self.cards[card].kernel_bytes
        )
        if self._in_backward_pass:
            self._load_kernels(card, "backward", (), self.cards[card].backward_kernel_bytes)
        origin = (name, "workspace", WORKSPACE)
        self._workspaces[key] = self._allocate(card, size, (size,), torch.uint8, *origin)

    def _load_kernels(self, card: int, what, pieces: Sequence[int], grows_bytes: int):
        """Once for each ``what``, they take pieces among the segments, and the context grows."""
        if (card, what) in self._kernels_loaded:
            return
        self._kernels_loaded.add((card, what))
        for size in pieces:
            self._allocator(card).addresses.take(size)
        # Of other cards all kernels are in the context from the beginning.
        if self.cards[card].kernel_bytes:
            self._allocator(card).context_bytes += grows_bytes

    def _load_decode_kernels(self, step: list[Event]):
        """Once for each size of decoding, by what one step of it allocates on a card."""
        pieces = operators.DECODE_KERNELS
        for card in sorted({event.card for event in step}):
            sizes = tuple(event.bytes for event in step if event.card == card and event.allocates)
            loaded = [what for at, what in self._kernels_loaded if at == card]
            if sum(isinstance(what, tuple) for what in loaded) < operators.DECODE_SIZES:
                self._load_kernels(card, sizes, pieces, sum(pieces))

    def release_workspaces(self):
        """As ``torch._C._cuda_clearCublasWorkspaces``: the next product takes it anew."""
        for workspace in self._workspaces.values():
            self._free(workspace)
        self._workspaces.clear()

    def _allocator(self, card: int) -> Allocator:
        check_ordinal(card, len(self.allocators))
        return self.allocators[card]
