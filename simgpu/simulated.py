"""``SimulatedRig``: cards that have no more than shapes and bytes, on which the full-size model
runs on a laptop."""

import os
from contextlib import contextmanager

from simgpu.accounting import Accounting, Block
from simgpu.addresses import AddressSpace
from simgpu.allocator import MIB, Allocator
from simgpu.base import CardMemory, Stages
from simgpu.catalog import Card, find_card
from simgpu.device import DEVICE_TYPE, MAX_CARDS, observe
from simgpu.expandable import ExpandableAllocator
from simgpu.host import Host
from simgpu.loading import simulated_world

# PyTorch 2.9 gave the variable a name without CUDA and reads both.
_ALLOC_CONF_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def check_count(count: int):
    """Refuse an impossible number of cards with a ``ValueError``."""
    if not isinstance(count, int) or not 1 <= count <= MAX_CARDS:
        raise ValueError(
            f"count is {count!r}; a rig has 1 to {MAX_CARDS} cards. Give a whole number in between."
        )


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


class SimulatedRig(Stages):
    """Simulated cards: tensors on them have shapes, types and bytes, and no numbers.

    ``AutoModelForCausalLM.from_pretrained("zai-org/glm-4v-9b", device_map="auto")`` in the ``with``
    block places the full-size model on them, without its weights. What is on the cards stays there
    between ``with`` blocks, as on a machine, until the objects that own it are deleted.
    ``rig.host.memory`` says what the last load took of the host's memory.

    Args:
        card, count: as of ``Rig``.
        alloc_conf: as the environment variable ``PYTORCH_CUDA_ALLOC_CONF``, which is read where
            this is None.
        reason: why the cards are simulated on a machine that has GPUs; ``provenance`` tells it.

    Raises:
        ValueError: unknown card, an impossible count, or a configuration that is not simulated.
    """

    def __init__(
        self,
        card: str = "L4",
        count: int = 1,
        alloc_conf: str | None = None,
        *,
        reason: str | None = None,
    ):
        super().__init__()
        check_count(count)
        self.card: Card = find_card(card)
        self.cards = [self.card] * count
        self.provenance = f"simulated ({reason})" if reason else "simulated"
        if alloc_conf is None:
            alloc_conf = next(filter(None, map(os.environ.get, _ALLOC_CONF_VARIABLES)), "")
        kind, options = read_alloc_conf(alloc_conf)
        addresses = AddressSpace(count)
        self.allocators = [
            kind(
                index,
                each.device_name,
                each.total_bytes,
                each.context_bytes,
                system_bytes=each.system_bytes,
                addresses=addresses,
                **options,
            )
            for index, each in enumerate(self.cards)
        ]
        self._accounting = Accounting(self.allocators, self.card)
        self.host = Host()
        self._world = None
        self._observer_before = None

    def __repr__(self):
        return f"Rig({len(self.cards)} x {self.card.device_name}, {self.provenance})"

    def __enter__(self):
        self._activate()
        try:
            world = simulated_world(self)
            world.__enter__()
        except BaseException:
            Stages.active = None
            raise
        self._world = world
        self._observer_before = observe(self._observe)
        return self

    def __exit__(self, *exception):
        observe(self._observer_before)
        Stages.active = None
        world, self._world = self._world, None
        world.__exit__(*exception)

    def _observe(self, operator, results: list, arguments: tuple):
        self.host.observe(results, arguments)
        results = [tensor for tensor in results if tensor.device.type == DEVICE_TYPE]
        if results:
            self._accounting.observe(operator, results, arguments)

    def memory(self) -> list[CardMemory]:
        """Every card's memory now."""
        return [
            CardMemory(
                index=allocator.index,
                card=card.key,
                capacity_bytes=allocator.total_bytes,
                allocated_bytes=allocator.allocated,
                reserved_bytes=allocator.reserved,
                peak_allocated_bytes=allocator.peak_allocated,
                peak_reserved_bytes=allocator.peak_reserved,
                free_bytes=allocator.free_bytes,
            )
            for card, allocator in zip(self.cards, self.allocators, strict=True)
        ]

    def blocks(self, card: int = 0) -> list[Block]:
        """What is on one card now, largest block first."""
        return self._accounting.blocks(card)

    def _reset_peaks(self):
        for allocator in self.allocators:
            allocator.reset_peaks()

    @contextmanager
    def _named(self, name: str):
        outer, self._accounting.stage = self._accounting.stage, name
        try:
            yield
        finally:
            self._accounting.stage = outer

    def _blocks_at_failure(self) -> list[list[Block]]:
        return self._accounting.at_failure

    def repeat(self, step, count: int):
        """Run ``step()`` ``count`` times; on simulated cards most repetitions are replayed, not
        run.

        For decode steps, whose allocations are the same each time but for sizes growing with the
        length. After a replay the cards hold the bytes of ``count`` steps, but tensors that
        survived have the shapes of the second step: do not go on decoding from them.
        """
        self._accounting.repeat(step, count)

    def release_workspaces(self):
        """Free what matrix products keep on the cards for the next one."""
        self._accounting.release_workspaces()

    def deferring_errors(self):
        """Context manager for code an out-of-memory error cannot leave: it is raised when the block
        ends."""
        return self._accounting.deferring()
