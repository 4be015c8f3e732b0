"""``Rig``: the one door to GPU cards, real where the machine has them and simulated where it does
not."""

import torch

from simgpu.base import Stages
from simgpu.capped import RealRig, refused_by
from simgpu.catalog import find_card
from simgpu.machine import LocalRig
from simgpu.simulated import SimulatedRig, check_count


class Rig(Stages):
    """A number of equal cards on which the reader's code runs unchanged: what ``Rig(card, count)``
    makes.

    On a machine with that many GPUs, each of this kind or larger, these are used (``RealRig``),
    capped to the card's capacity where they are larger. On any other they are simulated
    (``SimulatedRig``). ``rig.provenance``, which stands beside every figure, says which it is and,
    on a machine that has some GPUs, why they were not enough.

    Inside ``with rig:`` ``torch.cuda`` shows these cards, "cuda:0" names them, and
    ``AutoModelForCausalLM.from_pretrained(checkpoint, device_map="auto")`` places the model on
    them.

    Args:
        card: a name from the catalogue, e.g. "L4", "RTX 4090", "A100-80".
        count: how many of them, 1 to 16.

    Raises:
        ValueError: unknown card, or an impossible count.
    """

    def __new__(cls, card: str = "L4", count: int = 1) -> "Stages":
        check_count(count)
        wanted = find_card(card)
        if isinstance(Stages.active, SimulatedRig) or not torch.cuda.is_available():
            return SimulatedRig(card, count)
        reason = refused_by(wanted, count)
        return SimulatedRig(card, count, reason=reason) if reason else RealRig(card, count)

    @staticmethod
    def simulated(card: str = "L4", count: int = 1, alloc_conf: str | None = None) -> SimulatedRig:
        """Simulated cards, also on a machine that has GPUs; arguments as of ``SimulatedRig``."""
        return SimulatedRig(card, count, alloc_conf)

    @staticmethod
    def here() -> LocalRig:
        """This machine as it is: its GPUs, or its CPU where there are none; figures are
        measured."""
        return LocalRig()
