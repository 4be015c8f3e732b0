"""``CappedRig``: this machine's GPUs standing for cards, capped to them where larger."""

import gc
from unittest import mock

import torch

from simgpu.catalog import Card, find_card
from simgpu.loading import from_pretrained_replaced
from simgpu.machine import MachineRig, measured_on
from simgpu.rig import ASSUME, Rig, cards_of
from simgpu.units import bytes_in_words


def refused_by(card: Card, count: int) -> str | None:
    """Why this machine's GPUs cannot stand for ``count`` such cards; None if they can."""
    found = torch.cuda.device_count()
    if found < count:
        return f"this machine has {found} GPU{'s' * (found != 1)}, not {count}"
    for index in range(count):
        if not _is(card, index) and _total(index) < card.total_bytes:
            gpu = f"GPU {index} of this machine, {torch.cuda.get_device_name(index)}"
            return f"{gpu}, is smaller than {_with_article(card.device_name)}"
    return None


class CappedRig(MachineRig):
    """The first ``count`` GPUs of this machine as cards of one kind.

    In its ``with`` block ``torch.cuda.device_count`` and ``mem_get_info`` answer as on a machine
    with these cards, so that ``device_map="auto"`` makes the same map, and PyTorch may reserve no
    more than it could there (``set_per_process_memory_fraction``). A GPU that *is* such a card is
    used as it is. The out-of-memory message is PyTorch's own and names the real capacity beside
    what is allowed. The first block of a rig begins with an empty cache. Two rigs share the GPUs:
    what one has loaded takes room from the other until it is deleted. ``refused_by`` must have
    nothing against card and count.
    """

    def __init__(self, card="L4", count: int = 1, assume: str = ASSUME[0]):
        super().__init__()
        self.cards = cards_of(card, count)
        self.card, count = self.cards[0], len(self.cards)
        # What PyTorch may reserve of each GPU that is larger than the card.
        self._fractions = {
            index: self.cap_bytes / _total(index)
            for index in range(count)
            if _total(index) > self.card.total_bytes and not _is(self.card, index)
        }
        self._mem_get_info = torch.cuda.mem_get_info
        self._entered = False

    @property
    def cap_bytes(self) -> int:
        """What PyTorch can reserve on such a card, beside the context and the driver's part."""
        return self.card.total_bytes - self.card.outside_bytes

    @property
    def provenance(self) -> str:
        """ "measured on ...", with devices, cap, date and versions."""
        name = _with_article(self.card.device_name)
        capped = f" capped to {bytes_in_words(self.cap_bytes)}, as {name}"
        return measured_on(len(self.cards), capped if self._fractions else "")

    # Unlike the machine as it is, this rig stands for torch.cuda in its block.
    __repr__, __enter__, __exit__ = Rig.__repr__, Rig.__enter__, Rig.__exit__

    def _build_world(self, stack):
        if not self._entered:
            self._entered = True
            gc.collect()
            torch.cuda.empty_cache()
        stack.enter_context(from_pretrained_replaced(self._staged))
        shown = {"device_count": self.cards.__len__, "mem_get_info": self._shown_memory}
        stack.enter_context(mock.patch.multiple(torch.cuda, **shown))
        for index, fraction in self._fractions.items():
            torch.cuda.set_per_process_memory_fraction(fraction, index)
            stack.callback(torch.cuda.set_per_process_memory_fraction, 1.0, index)

    @property
    def devices(self) -> list[tuple[str, int]]:
        """Name and capacity in bytes of every card the GPUs stand for."""
        return [
            (self.card.key, self.card.total_bytes if index in self._fractions else _total(index))
            for index in range(len(self.cards))
        ]

    def _free_bytes(self, index: int) -> int:
        return self._shown_memory(index)[0]

    def _staged(self, original, cls, *args, **kwargs):
        """``from_pretrained`` as a stage of its own, as on simulated cards."""
        with self.loading():
            return original(cls, *args, **kwargs)

    def _shown_memory(self, device=None) -> tuple[int, int]:
        """``torch.cuda.mem_get_info`` of the card the GPU stands for."""
        index = torch.cuda._utils._get_device_index(device, optional=True)
        free, total = self._mem_get_info(index)
        if index not in self._fractions:
            return free, total
        room = self.card.total_bytes - self.card.context_bytes - self.card.system_bytes
        return max(0, min(free, room - torch.cuda.memory_reserved(index))), self.card.total_bytes


def _total(index: int) -> int:
    return torch.cuda.get_device_properties(index).total_memory


def _is(card: Card, index: int) -> bool:
    try:
        return find_card(torch.cuda.get_device_name(index)) is card
    except ValueError:  # not in the catalogue
        return False


def _with_article(name: str) -> str:
    # "NVIDIA" and "RTX" are said letter by letter.
    return f"{'an' if name[0] in 'AEFHILMNORSX' else 'a'} {name}"
