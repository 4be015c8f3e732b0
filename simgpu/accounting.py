"""Follows every tensor on simulated cards from birth to its last reference, and can replay what it
saw."""

import itertools
import weakref
from collections import defaultdict
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from simgpu import allocator as caching
from simgpu.allocator import Allocator
from simgpu.catalog import Card
from simgpu.operators import (
    CUBLAS_KERNELS,
    CUBLASLT_WORKSPACE_BYTES,
    DECODE_KERNELS,
    DECODE_SIZES,
    LONG_DECODE,
    MATRIX_PRODUCTS,
    NORM_KERNELS,
    WITH_BIAS,
    scratch_bytes,
)


@dataclass
class Block:
    """One live allocation: its card, its size in bytes and where it came from.

    ``bytes`` is what the allocator took for it, which is the tensor's size rounded up to whole
    blocks.
    """

    card: int
    bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    operator: str
    stage: str
    serial: int  # counts allocations of this process
    places: list[caching.Block] = field(
        repr=False
    )  # what the card's allocator gave, and takes back


@dataclass
class _Event:
    """One allocation or release of a recorded step; ``serial`` pairs the two."""

    allocates: bool
    card: int
    bytes: int
    serial: int


class Accounting:
    """Charges storages to the allocators of the cards they are on.

    The first matrix product on a card takes cuBLAS's workspace and loads its kernels, which the
    context grows by; the first of a backward pass, which PyTorch runs in a thread of its own, takes
    a workspace once more.

    Args:
        allocators: one per card.
        card: what all of them are.
    """

    def __init__(self, allocators: list[Allocator], card: Card):
        self.allocators = allocators
        self.card = card
        self.stage = "other"
        self._blocks: dict[int, Block] = {}
        self._references: dict[int, weakref.ref] = {}
        # (workspace, card, whether in the backward pass)
        self._workspaces: dict[tuple[str, int, bool], Block] = {}
        self._kernels_loaded: set[tuple[int, str]] = set()  # card, and what they are for
        self._decoded: dict[int, set[tuple[int, ...]]] = defaultdict(
            set
        )  # by card, sizes of long decodings
        self._serials = itertools.count()
        self._recording: list[_Event] | None = None
        self._deferring = False
        self._deferred: torch.OutOfMemoryError | None = None
        self.at_failure: list[list[Block]] = []

    def observe(self, operator, results: list[torch.Tensor], arguments: tuple = ()):
        """Charge what an operator newly allocated; the device module calls this after every
        operator.

        Raises:
            torch.OutOfMemoryError: a card has no room. ``at_failure`` then has what was on each
            card.
        """
        if self._deferred is not None:
            return
        try:
            self._charge(operator, results, arguments)
        except torch.OutOfMemoryError as error:
            self._remember_failure()
            if not self._deferring:
                raise
            self._deferred = error.with_traceback(None)

    @contextmanager
    def deferring(self):
        """Raise an out-of-memory error when the block ends instead of inside it, and count nothing
        after it.

        For backward passes: recomputing a checkpointed layer happens inside a C++ hook that cannot
        pass on a Python exception for this kind of device; torch would abort the process.
        """
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
            deferred, self._deferred = self._deferred, None
        if deferred is not None:
            raise deferred

    def _charge(self, operator, results: list[torch.Tensor], arguments: tuple):
        for tensor in results:
            card = tensor.device.index
            storage = tensor.untyped_storage()
            key = storage._cdata
            known = self._blocks.get(key)
            size = storage.nbytes()
            if known is not None:
                if size > known.bytes:  # the storage was resized in place
                    self._release(key)
                else:
                    continue
            if size == 0:
                continue
            place = self._allocator(card).allocate(size)
            block = Block(
                card,
                place.size,
                tuple(tensor.shape),
                tensor.dtype,
                operator._schema.name.removeprefix("aten::"),
                self.stage,
                next(self._serials),
                [place],
            )
            self._blocks[key] = block
            self._references[key] = weakref.ref(storage, lambda _, key=key: self._release(key))
            if self._recording is not None:
                self._recording.append(_Event(True, card, size, block.serial))
        name = operator._schema.name
        scratch = scratch_bytes(name, arguments, self.card)
        if scratch:
            self._charge_for_a_moment(results[0].device.index, scratch)
        if name == "aten::rsqrt":
            self._load_kernels(results[0].device.index, "normalisation", NORM_KERNELS, 0)
        if name in MATRIX_PRODUCTS and results:
            self._charge_workspace(
                "cuBLAS workspace", results[0].device.index, self.card.cublas_workspace_bytes
            )
            if name in WITH_BIAS:
                self._charge_workspace(
                    "cublasLt workspace", results[0].device.index, CUBLASLT_WORKSPACE_BYTES
                )

    def blocks(self, card: int) -> list[Block]:
        """What is on a card now, largest first."""
        everything = (*self._blocks.values(), *self._workspaces.values())
        return sorted(
            (block for block in everything if block.card == card), key=lambda block: -block.bytes
        )

    def repeat(self, step, count: int):
        """Do a decode step ``count`` times: run two, replay their allocations for the rest.

        ``step`` is called without arguments and must allocate the same sequence of blocks each
        time, with sizes that grow by a constant. Where it does not, every step is run.

        Raises:
            torch.OutOfMemoryError: as the step itself would, also while replaying.
        """
        recorded = [self._record(step) for _ in range(min(count, 2))]
        if count <= 2:
            return
        first, second = recorded
        if count >= LONG_DECODE:
            self._load_decode_kernels(first)
        sizes = [[event.bytes for event in events if event.allocates] for events in recorded]
        if len(sizes[0]) == len(sizes[1]):
            try:
                self._replay(first, second, count - 2)
            except torch.OutOfMemoryError:
                self._remember_failure()
                raise
        else:
            for _ in range(count - 2):
                step()

    def _remember_failure(self):
        self.at_failure = [self.blocks(index) for index in range(len(self.allocators))]

    def _record(self, step) -> list[_Event]:
        self._recording = []
        try:
            step()
        finally:
            events, self._recording = self._recording, None
        return events

    def _replay(self, first: list[_Event], second: list[_Event], count: int):
        """Repeat the second recorded step ``count`` more times; sizes grow as they did from the
        first."""
        # A block is known by its number in its step. A release is of a block made in the same step,
        # or of the one with the same number in the step before.
        made_first = [event for event in first if event.allocates]
        made_second = [event for event in second if event.allocates]
        number_first = {event.serial: number for number, event in enumerate(made_first)}
        number_second = {event.serial: number for number, event in enumerate(made_second)}
        growth = [
            late.bytes - early.bytes for early, late in zip(made_first, made_second, strict=True)
        ]
        survivors = {
            number_second[block.serial]: block
            for block in self._blocks.values()
            if block.serial in number_second
        }
        held = {number: block.places for number, block in survivors.items()}
        program = []  # allocator, table of the block, its number, and for an allocation its size and growth
        made: dict[int, list[caching.Block]] = {}
        for event in second:
            allocator = self._allocator(event.card)
            if event.allocates:
                number = number_second[event.serial]
                program.append((allocator, None, number, event.bytes, growth[number]))
            elif event.serial in number_second:
                program.append((allocator, made, number_second[event.serial], 0, 0))
            elif number_first.get(event.serial) in survivors:
                program.append((allocator, held, number_first[event.serial], 0, 0))
        try:
            for repetition in range(1, count + 1):
                for allocator, table, number, size, grows in program:
                    if table is None:
                        made[number] = [allocator.allocate(size + repetition * grows)]
                    else:
                        for place in table.pop(number):
                            allocator.free(place)
                self._hold(held, made)
                for number, block in survivors.items():
                    block.bytes = sum(place.size for place in held[number])
        except torch.OutOfMemoryError:
            # As when a real step fails: what replaced an older block stays, the step's own
            # temporaries go.
            for number, places in made.items():
                if number in survivors and number not in held:
                    held[number] = places
                else:
                    for place in places:
                        self._allocator(made_second[number].card).free(place)
            raise
        finally:
            # What is still held belongs to the tensors that survived the recorded step.
            for number, block in survivors.items():
                block.places = held.get(
                    number, []
                )  # none: given back by the step that failed, and not made again
                block.bytes = sum(place.size for place in block.places)

    @staticmethod
    def _hold(held: dict[int, list[caching.Block]], made: dict[int, list[caching.Block]]):
        """What a step leaves replaces what the one before left, or adds to it where that was not
        released."""
        for number, places in made.items():
            held[number] = held.get(number, []) + places
        made.clear()

    def _release(self, key: int):
        block = self._blocks.pop(key, None)
        self._references.pop(key, None)
        if block is not None:
            for place in block.places:
                self._allocator(block.card).free(place)
            if self._recording is not None:
                self._recording.append(_Event(False, block.card, block.bytes, block.serial))

    def _charge_for_a_moment(self, card: int, sizes: list[int]):
        """Take blocks and give them back at once, as a kernel does with its scratch."""
        allocator, taken = self._allocator(card), []
        try:
            for size in sizes:
                taken.append((size, allocator.allocate(size), next(self._serials)))
        finally:
            for _, place, _ in reversed(taken):
                allocator.free(place)
        if self._recording is not None:
            self._recording += [_Event(True, card, size, serial) for size, _, serial in taken]
            self._recording += [
                _Event(False, card, size, serial) for size, _, serial in reversed(taken)
            ]

    def _charge_workspace(self, name: str, card: int, size: int):
        key = (name, card, self._deferring)
        if key in self._workspaces:
            return
        self._load_kernels(card, "matrix products", CUBLAS_KERNELS, self.card.kernel_bytes)
        if self._deferring:
            self._load_kernels(card, "backward", (), self.card.backward_kernel_bytes)
        place = self._allocator(card).allocate(size)
        self._workspaces[key] = Block(
            card, place.size, (size,), torch.uint8, name, "workspace", next(self._serials), [place]
        )

    def _load_kernels(self, card: int, what: str, pieces: Sequence[int], grows_bytes: int):
        """Once for each ``what``."""
        if (card, what) not in self._kernels_loaded:
            self._kernels_loaded.add((card, what))
            self._grow(card, pieces, grows_bytes)

    def _load_decode_kernels(self, step: list[_Event]):
        """Once for each size of decoding, by what one step of it allocates on a card."""
        for card in sorted({event.card for event in step}):
            sizes = tuple(event.bytes for event in step if event.card == card and event.allocates)
            seen = self._decoded[card]
            if sizes not in seen and len(seen) < DECODE_SIZES:
                seen.add(sizes)
                self._grow(card, DECODE_KERNELS, sum(DECODE_KERNELS))

    def _grow(self, card: int, pieces: Sequence[int], grows_bytes: int):
        """Kernels take pieces of memory among the segments, and in all ``grows_bytes`` for the
        context."""
        self._allocator(card).keep_addresses(pieces)
        if (
            self.card.kernel_bytes
        ):  # of other cards all kernels are in the context from the beginning
            self._allocator(card).context_bytes += grows_bytes

    def release_workspaces(self):
        """As ``torch._C._cuda_clearCublasWorkspaces``: the next matrix product takes its workspace
        anew."""
        for block in self._workspaces.values():
            for place in block.places:
                self._allocator(block.card).free(place)
        self._workspaces.clear()

    def _allocator(self, card: int) -> Allocator:
        if card >= len(self.allocators):
            raise RuntimeError(
                f"CUDA error: invalid device ordinal (cuda:{card} of {len(self.allocators)}"
                " simulated cards). Use a lower index, or make the rig with a larger count."
            )
        return self.allocators[card]
