"""``Rig``: the one door to GPU cards, real or simulated, with their memory and a run's stages."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from simgpu.catalog import MAX_CARDS, Card, find_card, with_free

# What is done where a number is asked for that is not known: see ``numbers``.
ASSUME = ("refuse", "count")

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
    """A number of cards on which the reader's code runs unchanged.

    ``Rig(card, count)`` is a ``CappedRig`` on a machine with that many GPUs of this kind or larger,
    which are then capped to the card's capacity, and a ``SimulatedRig`` on any other.
    ``rig.provenance``, which stands beside every figure, says which, and why GPUs were not enough.

    Inside ``with rig:`` ``torch.cuda`` shows these cards, "cuda:0" names them, and
    ``from_pretrained(checkpoint, device_map="auto")`` places a model of transformers on them.

    Args:
        card: a name from the catalogue, e.g. "L4", "RTX 4090", "A100-80"; or a list of names, one
            of each card, where they differ (always simulated).
        count: how many of them, 1 to 16.
        assume, free_gib: as of ``SimulatedRig``. Real GPUs know every number, and with free memory
            given cards are always simulated.

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

    def __new__(cls, card="L4", count: int = 1, *others, **options) -> "Rig":
        if cls is not Rig:
            return super().__new__(cls)
        from simgpu.capped import CappedRig, refused_by
        from simgpu.simulated import SimulatedRig

        if others or options.keys() - {"assume", "free_gib"}:
            raise TypeError(
                "Rig takes a card and a count, as Rig('L4', 2), and assume and free_gib. Other"
                " options of simulated cards are for Rig.simulated."
            )
        cards = cards_of(card, count)
        chosen, reason = SimulatedRig, None
        if torch.cuda.is_available() and not isinstance(Rig.active, SimulatedRig):
            if len(set(cards)) > 1 or options.get("free_gib") is not None:
                reason = "cards of several kinds, or in use by others, are only simulated"
            else:
                reason = refused_by(cards[0], len(cards))
            chosen = SimulatedRig if reason else CappedRig
        rig = super().__new__(chosen)
        rig.reason = reason
        return rig

    def __init__(self):
        self.stages: list[Stage] = []
        self.running: list[str] = []
        self.watchers: list[Callable[[], None]] = []

    def __repr__(self):
        return f"Rig({cards_in_words(self.cards)}, {self.provenance})"

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
        card="L4", count: int = 1, alloc_conf: str | None = None, **options
    ) -> "SimulatedRig":
        """Simulated cards, also on a machine that has GPUs; arguments as of ``SimulatedRig``."""
        from simgpu.simulated import SimulatedRig

        return SimulatedRig(card, count, alloc_conf, **options)

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


def cards_of(
    card: str | Card | Sequence[str | Card],
    count: int = 1,
    free_gib: float | Sequence[float] | None = None,
) -> list[Card]:
    """The cards that a name and a count mean, or a list of names, with so many GiB free on them.

    Raises:
        ValueError: unknown card, an impossible count, or one that is not the list's length, or free
            memory that a card cannot have.
    """
    if not isinstance(card, str | Card):
        kinds = list(card)
        if count not in (1, len(kinds)):
            raise ValueError(
                f"count is {count!r}, but card is a list of {len(kinds)}. A list names each card"
                " once for every one there is: leave count out."
            )
        count = len(kinds)
    else:
        kinds = [card] * count if isinstance(count, int) and count <= MAX_CARDS else []
    if not isinstance(count, int) or not 1 <= count <= MAX_CARDS:
        raise ValueError(
            f"count is {count!r}; a rig has 1 to {MAX_CARDS} cards. Give a whole number in between."
        )
    cards = [find_card(each) for each in kinds]
    if free_gib is None:
        return cards
    free = [free_gib] * count if isinstance(free_gib, int | float) else list(free_gib)
    if len(free) != count:
        raise ValueError(
            f"free_gib has {len(free)} figures for {count} cards. Give one for all, or one for each"
            " card."
        )
    return [with_free(*each) for each in zip(cards, free, strict=True)]


def cards_in_words(cards: Sequence[Card]) -> str:
    """ "2 x NVIDIA L4", or each kind with its number."""
    kinds = Counter(card.device_name for card in cards)
    return ", ".join(f"{number} x {name}" for name, number in kinds.items())
