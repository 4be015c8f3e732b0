"""``SimulatedRig``: cards with shapes and bytes only, so that any model runs on a laptop."""

import logging
import os
import weakref
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch

from simgpu import graphs
from simgpu.accounting import Accounting, Allocation
from simgpu.addresses import AddressSpace
from simgpu.allocator import Allocator
from simgpu.catalog import Card
from simgpu.device import observe, on_card
from simgpu.expandable import ExpandableAllocator
from simgpu.history import is_below_operators
from simgpu.host import Host
from simgpu.intercept import simulated_torch
from simgpu.loading import simulated_loading
from simgpu.numbers import LENGTHS, Numbers
from simgpu.purposes import GRADIENTS, WEIGHTS, all_modules, gradients_of, registration, weights_of
from simgpu.rig import ASSUME, CardMemory, Rig, Stage, cards_of
from simgpu.streams import stream_now
from simgpu.units import MIB

# PyTorch 2.9 gave the variable a name without CUDA and reads both.
ALLOC_CONF = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
SIMULATED_OPTIONS = ("expandable_segments", "max_split_size_mb")


def read_alloc_conf(text: str) -> tuple[type[Allocator], dict]:
    """The class of allocator and its options that a ``PYTORCH_CUDA_ALLOC_CONF`` asks for.

    Raises:
        ValueError: an option that is not simulated, or a value PyTorch would refuse.
    """
    kind, options = Allocator, {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition(":")
        if name == "expandable_segments" and value in ("True", "False"):
            kind = ExpandableAllocator if value == "True" else Allocator
        elif name == "max_split_size_mb" and value.isdigit():
            options["max_split_bytes"] = int(value) * MIB
        else:
            raise ValueError(
                f"{part!r} of the allocator's configuration {text!r} is not simulated; expected"
                " expandable_segments:True or :False, or max_split_size_mb:N, separated by commas."
                " Leave it out, also of the environment variable PYTORCH_CUDA_ALLOC_CONF, or use"
                " real cards."
            )
    return kind, options


_RULES_LOG = logging.getLogger("torch._subclasses.fake_tensor")


class SimulatedRig(Rig):
    """Simulated cards: tensors on them have shapes, types and bytes, and no numbers.

    ``from_pretrained`` in the ``with`` block loads models of full size, without their weights. What
    is on the cards stays there between ``with`` blocks, as on a machine, until the objects that own
    it are deleted. ``rig.host.memory`` says what the last load took of the host's memory.

    Args:
        card, count: as of ``Rig``.
        alloc_conf: as the environment variable ``PYTORCH_CUDA_ALLOC_CONF``, read where it is None.
        free_gib: GiB that are free on each card before the program starts, as nvidia-smi shows
            them, where others use the rest: one figure for all cards, or a list.
        assume: "refuse" a number that is not known where one is asked for, or assume one and
            "count" it in ``assumed``.
        capped: False lets a run take more than the cards have, which then is what it needs; they
            say what they do of capacity and free memory, so that device maps stay the same.

    Raises:
        ValueError: unknown card, an impossible count, free memory that the card cannot have, or a
            configuration that is not simulated.
    """

    def __init__(
        self,
        card: str | Card | Sequence[str | Card] = "L4",
        count: int = 1,
        alloc_conf: str | None = None,
        *,
        free_gib: float | Sequence[float] | None = None,
        assume: str = ASSUME[0],
        capped: bool = True,
    ):
        super().__init__()
        self.cards = cards_of(card, count, free_gib)
        self.card: Card = self.cards[0]
        if alloc_conf is None:
            alloc_conf = next(filter(None, map(os.environ.get, ALLOC_CONF)), "")
        kind, options = read_alloc_conf(alloc_conf)
        options |= {"addresses": AddressSpace(len(self.cards)), "capped": capped}
        self.allocators = [
            kind(
                index,
                each.device_name,
                each.total_bytes,
                each.context_bytes,
                system_bytes=each.system_bytes,
                stream=partial(stream_now, index),
                **options,
            )
            for index, each in enumerate(self.cards)
        ]
        self._accounting = Accounting(self.allocators, self.cards)
        self.host = Host()
        self.numbers = Numbers(assume)
        self.graphs = graphs.names(self)
        # Whose parameters a backward pass makes gradients of. Not the parameters themselves: torch
        # cannot move a module whose parameters are weakly referred to.
        self.modules: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    @property
    def provenance(self) -> str:
        """ "simulated", what of the card is assumed, and why on a machine that has GPUs."""
        remarks = {card.assumed: None for card in self.cards} | {self.reason: None}
        remarks = "; ".join(filter(None, remarks))
        return f"simulated ({remarks})" if remarks else "simulated"

    @property
    def assumed(self) -> dict[str, int]:
        """How often each operator was asked for a number that is not known and one was assumed."""
        return dict(self.numbers.assumptions.made)

    @property
    def unmodelled(self) -> dict[str, int | None]:
        """Operators that ran and whose scratch memory is not modelled: at most so many bytes at a
        time, None where no bound is known."""
        return dict(self._accounting.unmodelled)

    @property
    def exact(self) -> bool:
        """Whether so far every operator's memory is modelled, and no length was assumed."""
        return not self.unmodelled and not self.assumed.keys() & LENGTHS

    def _build_world(self, stack):
        # It reports each failed rule, which the exception says as well.
        stack.enter_context(mock.patch.object(_RULES_LOG, "disabled", True))
        stack.enter_context(simulated_torch(self))
        stack.enter_context(simulated_loading(self))
        stack.enter_context(registration(self._accounting))
        before = observe(self._observe, self.numbers)
        stack.callback(lambda: observe(*before))

    def _observe(self, operator, results: list, arguments: tuple, keywords: dict):
        self.host.observe(results, arguments)
        results = [tensor for tensor in results if on_card(tensor)]
        if results:
            self._accounting.observe(operator, results, arguments, keywords)

    def memory(self) -> list[CardMemory]:
        return [
            CardMemory(
                index=each.index,
                card=self.cards[each.index].key,
                capacity_bytes=each.total_bytes,
                allocated_bytes=each.allocated,
                reserved_bytes=each.reserved,
                peak_allocated_bytes=each.peak_allocated,
                peak_reserved_bytes=each.peak_reserved,
                free_bytes=each.free_bytes,
            )
            for each in self.allocators
        ]

    def blocks(self, card: int = 0) -> list[Allocation]:
        return self._accounting.blocks(card)

    def _reset_peaks(self):
        for allocator in self.allocators:
            allocator.reset_peaks()

    @contextmanager
    def _inside(self, stage: Stage):
        with mock.patch.object(self._accounting, "stage", stage.name):
            yield
            if stage.name == "load":
                self.register_weights(all_modules())

    def register_weights(self, modules: Iterable[torch.nn.Module]):
        """The modules' parameters and buffers are weights. Called for the models that
        ``from_pretrained`` returns, and for all when a stage named "load" ends."""
        found = {each for module in modules for each in module.modules()}
        self.modules.update(found)
        self._accounting.register(WEIGHTS, weights_of(found))

    @contextmanager
    def out_of_memory_stays(self):
        """An out-of-memory error in the block ends it as one, whatever is made of it inside.

        transformers' loader catches what happens while it joins tensors and says so in words.
        """
        before = len(self._accounting.failures)
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except Exception:
            if len(self._accounting.failures) == before:
                raise
            raise torch.OutOfMemoryError(self._accounting.failures[before]) from None

    def _forget_simulation(self, error: torch.OutOfMemoryError):
        # Below an operator CUDA has no frames of Python that would keep its arguments.
        place = error.__traceback__
        while place is not None:
            below = place.tb_next
            while below is not None and is_below_operators(below.tb_frame.f_code.co_filename):
                below = below.tb_next
            place.tb_next, place = below, below

    def _blocks_at_failure(self) -> list[list[Allocation]]:
        return self._accounting.at_failure

    def repeat(self, step, count: int):
        """Run ``step()`` ``count`` times; most repetitions are replayed, not run.

        For decode steps, whose allocations are the same each time but for sizes growing with the
        length. After a replay the cards hold the bytes of ``count`` steps, but tensors that
        survived have the shapes of the second step: do not go on decoding from them.
        """
        self._accounting.repeat(step, count)

    def is_capturing(self, card: int) -> bool:
        """Whether a CUDA graph is captured on this thread's present stream of a card."""
        return stream_now(card) in self.allocators[card].captures

    def note_unmodelled(self, operator: str, bound_bytes: int | None):
        """Count an operator that takes memory by no known rule, at most so much."""
        self._accounting.unmodelled.note(operator, bound_bytes)

    @property
    def exactness(self) -> str:
        """ "exact", or "not exact: ..." with what is not, of everything since the rig was made."""
        return str(self._accounting.unmodelled)

    def snapshot(self) -> dict:
        """Every segment and block, as ``torch.cuda.memory._snapshot`` gives them."""
        return self._accounting.snapshot()

    def record_history(self, *arguments):
        """As ``torch._C._cuda_record_memory_history``: what ``snapshot`` tells of the past."""
        self._accounting.history.record(*arguments)

    def release_workspaces(self):
        """Free what matrix products keep on the cards for the next one."""
        self._accounting.release_workspaces()

    @contextmanager
    def backward_pass(self):
        """Around a backward pass, which ends with the gradients in place."""
        with self._accounting.backward_pass():
            yield
        weights = weights_of(list(self.modules))
        self._accounting.register(GRADIENTS, gradients_of(weights))
