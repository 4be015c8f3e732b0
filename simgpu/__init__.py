"""GPU cards to run on: a catalogue, and ``Rig``, inside which the reader's code finds them."""

from simgpu.base import CardMemory, Stage
from simgpu.catalog import CARDS, Card, find_card
from simgpu.device import MAX_CARDS
from simgpu.host import HostMemory
from simgpu.rig import Rig

__all__ = ["CARDS", "MAX_CARDS", "Card", "CardMemory", "HostMemory", "Rig", "Stage", "find_card"]
