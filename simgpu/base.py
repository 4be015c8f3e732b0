"""The memory of every card at a moment, and the named stages of a run; the same for simulated and
real cards."""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field

import torch

from simgpu.accounting import Block


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
    """A named part of a run: memory per card when it ended, peaks since it began, the error that
    ended it.

    After an error ``blocks`` lists what was on each card at that moment, largest first; otherwise
    it is empty.
    """

    name: str
    memory: list[CardMemory] = field(default_factory=list)
    out_of_memory: str | None = None
    blocks: list[list[Block]] = field(default_factory=list)


class Stages:
    """What simulated and real rigs share: the named parts of a run, and that only one stands for
    torch.cuda."""

    active: "Stages | None" = None

    def __init__(self):
        self.stages: list[Stage] = []
        # Called at the end of every stage, while it still counts as running.
        self.watchers: list[Callable[[], None]] = []

    def memory(self) -> list[CardMemory]:
        """Every card's memory now."""
        raise NotImplementedError

    @contextmanager
    def stage(self, name: str):
        """Name a part of the run ("load", "prefill", ...): its peaks and any out-of-memory error
        are kept.

        The record is appended to ``rig.stages`` and given to the block.
        """
        stage = Stage(name)
        self.stages.append(stage)
        self._reset_peaks()
        with self._named(name):
            try:
                yield stage
            except torch.OutOfMemoryError as error:
                stage.out_of_memory = str(error)
                stage.blocks = self._blocks_at_failure()
                error.add_note(f'in the stage "{name}"')
                raise
            finally:
                for watcher in self.watchers:
                    watcher()
                stage.memory = self.memory()

    @contextmanager
    def loading(self):
        """Around ``from_pretrained``: a stage "load" of its own, unless the caller is inside a
        stage already."""
        if any(not stage.memory for stage in self.stages):
            yield
        else:
            with self.stage("load"):
                yield

    def _activate(self):
        """Called where a ``with`` block begins in which ``torch.cuda`` shows other cards than the
        machine's."""
        if Stages.active is not None:
            raise RuntimeError(
                f"{Stages.active} is active already; only one rig can stand for torch.cuda at a"
                " time. Leave its `with` block first."
            )
        Stages.active = self

    def _reset_peaks(self):
        raise NotImplementedError

    def _named(self, name: str):
        """Context manager around a stage; simulated cards write its name on every block."""
        return nullcontext()

    def _blocks_at_failure(self) -> list[list[Block]]:
        """What was on each card; real cards do not tell, so there are empty lists for them."""
        return [[] for _ in self.memory()]
