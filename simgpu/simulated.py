"""``SimulatedRig``: cards with shapes and bytes only, so that any model runs on a laptop."""

import os
import weakref
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from simgpu.accounting import Accounting, Allocation
from simgpu.addresses import AddressSpace
from simgpu.allocator import Allocator
from simgpu.catalog import Card, find_card
from simgpu.device import observe, on_card
from simgpu.expandable import ExpandableAllocator
from simgpu.host import Host
from simgpu.intercept import simulated_torch
from simgpu.loading import simulated_loading
from simgpu.numbers import Numbers
from simgpu.purposes import GRADIENTS, WEIGHTS, all_modules, gradients_of, registration, weights_of
from simgpu.rig import CardMemory, Rig, Stage, check_count
from simgpu.scratch import Unmodelled
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


_HERE, _TORCH = Path(__file__).parent, Path(torch.__file__).parent
_BELOW = tuple(
    str(_TORCH / name)
    for name in ("_subclasses", "_dynamo", "_compile.py", "_ops.py", "utils/_stats.py")
)


def _is_below_operators(file: str) -> bool:
    """Whether a file's functions run below an operator of PyTorch on simulated cards alone."""
    return Path(file).parent == _HERE or file.startswith(_BELOW)


class SimulatedRig(Rig):
    """Simulated cards: tensors on them have shapes, types and bytes, and no numbers.

    ``from_pretrained`` in the ``with`` block loads models of full size, without their weights. What
    is on the cards stays there between ``with`` blocks, as on a machine, until the objects that own
    it are deleted. ``rig.host.memory`` says what the last load took of the host's memory.

    Args:
        card, count: as of ``Rig``.
        alloc_conf: as the environment variable ``PYTORCH_CUDA_ALLOC_CONF``, read where it is None.

    Raises:
        ValueError: unknown card, an impossible count, or a configuration that is not simulated.
    """

    def __init__(self, card: str = "L4", count: int = 1, alloc_conf: str | None = None):
        super().__init__()
        check_count(count)
        self.card: Card = find_card(card)
        self.cards = [self.card] * count
        if alloc_conf is None:
            alloc_conf = next(filter(None, map(os.environ.get, ALLOC_CONF)), "")
        kind, options = read_alloc_conf(alloc_conf)
        options |= {"system_bytes": self.card.system_bytes, "addresses": AddressSpace(count)}
        common = (self.card.device_name, self.card.total_bytes, self.card.context_bytes)
        self.allocators = [kind(index, *common, **options) for index in range(count)]
        self._accounting = Accounting(self.allocators, self.card)
        self.host = Host()
        self.numbers = Numbers()
        # Whose parameters a backward pass makes gradients of. Not the parameters themselves: torch
        # cannot move a module whose parameters are weakly referred to.
        self._modules: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    @property
    def provenance(self) -> str:
        """ "simulated", what of the card is assumed, and why on a machine that has GPUs."""
        remarks = "; ".join(filter(None, (self.card.assumed, self.reason)))
        return f"simulated ({remarks})" if remarks else "simulated"

    def _build_world(self, stack):
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
                card=self.card.key,
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
        self._modules.update(found)
        self._accounting.register(WEIGHTS, weights_of(found))

    def _forget_simulation(self, error: torch.OutOfMemoryError):
        # Below an operator CUDA has no frames of Python that would keep its arguments.
        place = error.__traceback__
        while place is not None:
            below = place.tb_next
            while below is not None and _is_below_operators(below.tb_frame.f_code.co_filename):
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

    @property
    def unmodelled_calls(self) -> Unmodelled:
        """Operators that may have taken memory nobody knows of, with a bound."""
        return self._accounting.unmodelled

    @property
    def unmodelled(self) -> dict[str, int]:
        """How often each operator ran whose memory besides its results is not modelled exactly."""
        return dict(self.unmodelled_calls.calls)

    @property
    def exactness(self) -> str:
        """ "exact", or "not exact: ..." with what is not, of everything since the rig was made."""
        return str(self.unmodelled_calls)

    def snapshot(self) -> dict:
        """Every segment and block, as ``torch.cuda.memory._snapshot`` gives them."""
        return self._accounting.snapshot()

    def release_workspaces(self):
        """Free what matrix products keep on the cards for the next one."""
        self._accounting.release_workspaces()

    @contextmanager
    def backward_pass(self):
        """Around a backward pass, which ends with the gradients in place."""
        with self._accounting.backward_pass():
            yield
        self._accounting.register(GRADIENTS, gradients_of(weights_of(list(self._modules))))
