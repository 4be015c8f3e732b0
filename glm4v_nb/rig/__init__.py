"""GPU cards to run on: a catalogue, and ``Rig``, inside which the reader's code finds them."""

from glm4v_nb.rig.catalog import CARDS, Card, find_card
from glm4v_nb.rig.device import MAX_CARDS
from glm4v_nb.rig.host import HostMemory
from glm4v_nb.rig.rig import Rig
from glm4v_nb.rig.stages import CardMemory, Stage

__all__ = ["CARDS", "MAX_CARDS", "Card", "CardMemory", "HostMemory", "Rig", "Stage", "find_card"]
