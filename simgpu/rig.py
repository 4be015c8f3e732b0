"""``Rig``: the one door to GPU cards, real or simulated, with their memory and a run's stages."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from simgpu.catalog import MAX_CARDS, find_card

if TYPE_CHECKING:
    from simgpu.accounting import Allocation
    from simgpu.machine import MachineRig
    from simgpu.simulated import SimulatedRig


@dataclass(frozen=True)
class CardMemory:
    """Memory of one card at one moment; all figures in bytes."""

    index: int
    card: str
    capacity_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    free_bytes: int

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass
class Stage:
    """A named part of a run: memory per card at its end, peaks since it began, what ended it.

    After an error ``blocks`` lists what was on each card then, largest first; else it is empty.
    """

    name: str
    memory: list[CardMemory] = field(default_factory=list)
    out_of_memory: str | None = None
    blocks: list[list["Allocation"]] = field(default_factory=list)


class Rig(ABC):
    """A number of equal cards on which the reader's code runs unchanged.

    ``Rig(card, count)`` is a ``CappedRig`` on a machine with that many GPUs of this kind or larger,
    which are then capped to the card's capacity, and a ``SimulatedRig`` on any other.
    ``rig.provenance``, which stands beside every figure, says which, and why GPUs were not enough.

    Inside ``with rig:`` ``torch.cuda`` shows these cards, "cuda:0" names them, and
    ``from_pretrained(checkpoint, device_map="auto")`` places a model of transformers on them.

    Args:
        card: a name from the catalogue, e.g. "L4", "RTX 4090", "A100-80".
        count: how many of them, 1 to 16.

    Attributes:
        stages: every stage so far, in the order in which they began.
        running: names of the stages that are running, outermost first.
        watchers: called at the end of every stage, while it still counts as running.

    Raises:
        ValueError: unknown card, or an impossible count.
    """

    active: ClassVar["Rig | None"] = None
    # Why the cards are simulated on a machine that has GPUs.
    reason: str | None = None

    def __new__(cls, card: str = "L4", count: int = 1, *others, **options) -> "Rig":
        if cls is not Rig:
            return super().__new__(cls)
        from simgpu.capped import CappedRig, refused_by
        from simgpu.simulated import SimulatedRig

        if others or options:
            raise TypeError(
                "Rig takes a card and a count, as Rig('L4', 2). Options of simulated cards are for"
                " Rig.simulated."
            )
        check_count(count)
        chosen, reason = SimulatedRig, None
        if torch.cuda.is_available() and not isinstance(Rig.active, SimulatedRig):
            reason = refused_by(find_card(card), count)
            chosen = SimulatedRig if reason else CappedRig
        rig = super().__new__(chosen)
        rig.reason = reason
        return rig

    def __init__(self):
        self.stages: list[Stage] = []
        self.running: list[str] = []
        self.watchers: list[Callable[[], None]] = []

    def __repr__(self):
        return f"Rig({len(self.cards)} x {self.card.device_name}, {self.provenance})"

    def __enter__(self):
        if Rig.active is not None:
            raise RuntimeError(
                f"{Rig.active} is active already; only one rig can stand for torch.cuda at a"
                " time. Leave its `with` block first."
            )
        with ExitStack() as stack:
            Rig.active = self
            stack.callback(setattr, Rig, "active", None)
            self._build_world(stack)
            self._world = stack.pop_all()
        return self

    def __exit__(self, *exception):
        self._world.__exit__(*exception)

    @staticmethod
    def simulated(
        card: str = "L4", count: int = 1, alloc_conf: str | None = None
    ) -> "SimulatedRig":
        """Simulated cards, also on a machine that has GPUs; arguments as of ``SimulatedRig``."""
        from simgpu.simulated import SimulatedRig

        return SimulatedRig(card, count, alloc_conf)

    @staticmethod
    def here() -> "MachineRig":
        """This machine as it is, its GPUs or else its CPU; figures are measured."""
        from simgpu.machine import MachineRig

        return MachineRig()

    @property
    @abstractmethod
    def provenance(self) -> str:
        """ "simulated", or "measured on ..." with devices, date and versions."""

    @abstractmethod
    def memory(self) -> list[CardMemory]:
        """Every card's memory now."""

    def blocks(self, card: int = 0) -> list["Allocation"]:
        """What is on one card now, largest first; real cards do not tell, so it is empty there."""
        return []

    def repeat(self, step: Callable[[], object], count: int):
        """Run ``step()`` ``count`` times."""
        for _ in range(count):
            step()

    @contextmanager
    def stage(self, name: str):
        """Name a part of the run ("load", "prefill", ...) to keep its peaks, and what ended it.

        The record is appended to ``rig.stages`` and given to the block.
        """
        stage = Stage(name)
        self.stages.append(stage)
        self.running.append(name)
        self._reset_peaks()
        with self._inside(stage):
            try:
                yield stage
            except torch.OutOfMemoryError as error:
                stage.out_of_memory = str(error)
                stage.blocks = self._blocks_at_failure()
                self._forget_simulation(error)
                error.add_note(f'in the stage "{name}"')
                raise
            finally:
                for watcher in self.watchers:
                    watcher()
                stage.memory = self.memory()
                self.running.pop()

    def loading(self):
        """Around ``from_pretrained``: a stage "load", unless inside a stage already."""
        return nullcontext() if self.running else self.stage("load")

    @abstractmethod
    def _build_world(self, stack: ExitStack):
        """Let ``torch.cuda`` show this rig's cards until the stack is closed."""

    @abstractmethod
    def _reset_peaks(self):
        """Begin new peaks at the present values."""

    def _inside(self, stage: Stage):
        """Context manager around a stage; simulated cards note what is made in it."""
        return nullcontext()

    def _forget_simulation(self, error: torch.OutOfMemoryError):
        """Let an error hold what it holds where cards are real, which it does where they are."""
        return

    def _blocks_at_failure(self) -> list[list["Allocation"]]:
        return [[] for _ in self.memory()]


def check_count(count: int):
    """Refuse an impossible number of cards with a ``ValueError``."""
    if not isinstance(count, int) or not 1 <= count <= MAX_CARDS:
        raise ValueError(
            f"count is {count!r}; a rig has 1 to {MAX_CARDS} cards. Give a whole number in between."
        )
