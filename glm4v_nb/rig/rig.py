"""``Rig``: the one door to GPU cards. ``Rig("L4", 2)`` simulates them; ``Rig.here()`` is this machine as it is."""

from contextlib import contextmanager

from glm4v_nb.rig.accounting import Accounting, Block
from glm4v_nb.rig.allocator import Allocator
from glm4v_nb.rig.catalog import Card, find_card
from glm4v_nb.rig.device import MAX_CARDS, observe
from glm4v_nb.rig.local import LocalRig
from glm4v_nb.rig.patches import simulated_world
from glm4v_nb.rig.stages import CardMemory, Stages


class Rig(Stages):
    """A number of equal cards on which the reader's code runs unchanged.

    Inside ``with rig:`` ``torch.cuda`` shows these cards, "cuda:0" names them, and
    ``AutoModelForCausalLM.from_pretrained("zai-org/glm-4v-9b", device_map="auto")`` places the full-size
    model on them. Tensors on simulated cards have shapes and bytes but no numbers. What is on the cards stays
    there between ``with`` blocks, as on a machine, until the objects that own it are deleted.

    Args:
        card: a name from the catalogue, e.g. "L4", "RTX 4090", "A100-80".
        count: how many of them, 1 to 16.

    Raises:
        ValueError: unknown card, or an impossible count.
    """

    _active: "Rig | None" = None
    provenance = "simulated"

    def __init__(self, card: str = "L4", count: int = 1):
        super().__init__()
        if not isinstance(count, int) or not 1 <= count <= MAX_CARDS:
            raise ValueError(
                f"count is {count!r}; a rig has 1 to {MAX_CARDS} cards. Give a whole number in between."
            )
        self.card: Card = find_card(card)
        self.cards = [self.card] * count
        self.allocators = [
            Allocator(index, each.device_name, each.total_bytes, each.context_bytes)
            for index, each in enumerate(self.cards)
        ]
        self._accounting = Accounting(self.allocators, self.card.cublas_workspace_bytes)
        self._world = None

    @staticmethod
    def here() -> LocalRig:
        """This machine as it is: its GPUs, or its CPU where there are none; figures are measured."""
        return LocalRig()

    def __repr__(self):
        return f"Rig({len(self.cards)} x {self.card.device_name}, {self.provenance})"

    def __enter__(self):
        if Rig._active is not None:
            raise RuntimeError(
                f"{Rig._active} is active already; only one rig can stand for torch.cuda at a time. Leave "
                "its `with` block first."
            )
        world = simulated_world(self)
        world.__enter__()
        self._world = world
        Rig._active = self
        observe(self._accounting.observe)
        return self

    def __exit__(self, *exception):
        observe(None)
        Rig._active = None
        world, self._world = self._world, None
        world.__exit__(*exception)

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
        """Run ``step()`` ``count`` times; on simulated cards most repetitions are replayed, not run.

        For decode steps, whose allocations are the same each time but for sizes growing with the length. After a
        replay the cards hold the bytes of ``count`` steps, but tensors that survived have the shapes of the second
        step: do not go on decoding from them.
        """
        self._accounting.repeat(step, count)

    def deferring_errors(self):
        """Context manager for code an out-of-memory error cannot leave: it is raised when the block ends."""
        return self._accounting.deferring()

    @contextmanager
    def loading(self):
        """Marks ``from_pretrained``: a stage of its own, unless the caller has named one."""
        if self._accounting.stage != "other":
            yield
        else:
            with self.stage("load"):
                yield
