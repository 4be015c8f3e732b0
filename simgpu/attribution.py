"""Where a peak comes from: what was on each card when it was fullest, by purpose and by line."""

import linecache
import os
import sys
import sysconfig
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from unittest import mock

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from simgpu import purposes
from simgpu.accounting import Allocation

# The words of the question; ``purposes`` has those of memory.
_NAMES = {purposes.WEIGHTS: "parameters", purposes.OPTIMIZER_STATE: "optimizer"}
PURPOSES = (
    "parameters",
    "gradients",
    "optimizer",
    purposes.KV_CACHE,
    purposes.ACTIVATIONS,
    purposes.WORKSPACE,
)
_LIBRARIES = tuple(
    {sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {str(Path(__file__).parent) + os.sep, str(Path(torch.__file__).parents[1]) + os.sep}
)


@dataclass(frozen=True)
class Line:
    """A line of the caller's code, and the bytes that were made while it ran."""

    file: str
    line: int
    text: str
    bytes: int


@dataclass
class Peak:
    """One card's most, in bytes, and what was on all cards when most was allocated on it."""

    card: int
    allocated_bytes: int = 0
    reserved_bytes: int = 0
    everything: list[Allocation] = field(default_factory=list)

    def by_purpose(self) -> dict[str, int]:
        """Bytes of each purpose; they add up to the peak."""
        found = Counter(dict.fromkeys(PURPOSES, 0))
        for each in self._there:
            found[_NAMES.get(each.purpose, each.purpose)] += each.bytes
        # Of steps that were replayed only what they leave has a record.
        found[purposes.ACTIVATIONS] += self.allocated_bytes - sum(found.values())
        return dict(found)

    @property
    def _there(self) -> list[Allocation]:
        return [each for each in self.everything if each.card == self.card]

    def by_line(self) -> list[Line]:
        """Bytes of each line, largest first; what no line of the caller's made is left out."""
        found: Counter[tuple[str, int]] = Counter()
        for each in self._there:
            if each.caller is not None:
                found[each.caller] += each.bytes
        return [
            Line(_shown(file), line, linecache.getline(file, line).strip(), size)
            for (file, line), size in found.most_common()
        ]


class Attribution:
    """In its ``with`` block, inside the rig's, every card's peak is kept with what was on it.

    Looking for the line that makes a tensor takes time: ``lines=False`` leaves ``by_line`` empty.

    Attributes:
        peaks: one ``Peak`` for each card.
        failures: the messages of all out-of-memory errors, in order.
    """

    def __init__(self, rig, lines: bool = True):
        self._rig, self._accounting, self._lines = rig, rig._accounting, lines
        self.peaks = [Peak(index) for index in range(len(rig.cards))]
        self._stack = ExitStack()
        self._is_own: dict[CodeType, bool] = {}

    @property
    def failures(self) -> list[str]:
        return self._accounting.failures

    def __enter__(self):
        stack = self._stack
        if self._lines:
            stack.enter_context(mock.patch.object(self._accounting, "caller", self._caller))
        for allocator in self._rig.allocators:
            allocator.listeners.append(self._before)
            stack.callback(allocator.listeners.remove, self._before)
        stack.callback(register_module_forward_pre_hook(self._meets).remove)
        moved = torch.nn.Module._apply

        def apply(module, *args, **kwargs):
            moved(module, *args, **kwargs)
            self._meets(module, None, again=True)
            return module

        stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", apply))
        return self

    def __exit__(self, *exception):
        for allocator in self._rig.allocators:
            self._before(allocator, True)
        self._stack.close()

    def settle(self):
        """Ask all modules and optimisers there are what they hold: where a run was cut off."""
        self._rig.register_weights(purposes.all_modules())
        weights = purposes.weights_of(list(self._rig.modules))
        self._accounting.register(purposes.GRADIENTS, purposes.gradients_of(weights))
        for optimizer in purposes.all_optimizers():
            purposes.register_optimizer(self._accounting, optimizer)

    def _meets(self, module: torch.nn.Module, inputs, again: bool = False):
        if again or module not in self._rig.modules:
            self._rig.modules.add(module)
            self._accounting.register(purposes.WEIGHTS, purposes.weights_of([module]))

    def _before(self, allocator, releases: bool):
        """Before a release a card may be at its peak, which an allocation before it has made."""
        peak = self.peaks[allocator.index]
        peak.reserved_bytes = max(peak.reserved_bytes, allocator.peak_reserved)
        if releases and allocator.allocated > peak.allocated_bytes:
            peak.allocated_bytes = allocator.allocated
            peak.everything = self._accounting.everything()

    def _caller(self) -> tuple[str, int] | None:
        """File and line of the innermost frame that is no library's."""
        frame: FrameType | None = sys._getframe(2)
        is_own = self._is_own
        while frame is not None:
            code = frame.f_code
            own = is_own.get(code)
            if own is None:
                name = code.co_filename
                own = is_own[code] = not name.startswith((*_LIBRARIES, "<frozen", "<eval"))
            if own:
                return code.co_filename, frame.f_lineno
            frame = frame.f_back
        return None


def _shown(file: str) -> str:
    """A file as a reader calls it: from the working directory where it is below."""
    path = os.path.relpath(file) if os.path.isabs(file) else file
    return os.path.basename(file) if path.startswith("..") else path
