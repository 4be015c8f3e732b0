"""Replays a decode step on simulated cards: its allocations and releases, without running it."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from simgpu.allocator import Allocator, Block


@dataclass
class Event:
    """One allocation or release of a recorded step; ``serial`` pairs the two."""

    allocates: bool
    card: int
    bytes: int
    serial: int


class Replay:
    """Repeats the second of two recorded steps of as many allocations; sizes grow as they did.

    An allocation is known by its number in its step. A release is of one made in the same step, or
    of the one with the same number in the step before. ``live`` is what is on the cards now
    (``accounting.Allocation``).
    """

    def __init__(
        self, first: list[Event], second: list[Event], live: Iterable, allocators: list[Allocator]
    ):
        self._allocators = allocators
        early, late = ([event for event in step if event.allocates] for step in (first, second))
        self._cards = [event.card for event in late]
        before, number = (
            {event.serial: count for count, event in enumerate(step)} for step in (early, late)
        )
        # What the step leaves behind, by its number.
        self._survivors = {number[each.serial]: each for each in live if each.serial in number}
        # The blocks behind it now, and those that the repetition at hand has made.
        self._held = {count: each.places for count, each in self._survivors.items()}
        self._made: dict[int, list[Block]] = {}
        # Of each event: allocator, table of the block (None to make one), number, size, growth.
        self._program = []
        for event in second:
            allocator, own = allocators[event.card], number.get(event.serial)
            if event.allocates:
                growth = event.bytes - early[own].bytes
                self._program.append((allocator, None, own, event.bytes, growth))
            elif own is not None:
                self._program.append((allocator, self._made, own, 0, 0))
            elif before.get(event.serial) in self._survivors:
                self._program.append((allocator, self._held, before[event.serial], 0, 0))

    def run(self, count: int):
        """Repeat the step; what survived the recorded one then holds what survived the last."""
        try:
            for repetition in range(1, count + 1):
                self._step(repetition)
                self._hand_over(self._held)
        except torch.OutOfMemoryError:
            self._unwind()
            raise
        finally:
            # Nothing is held of what the failed step gave back and did not make again.
            self._hand_over({number: self._held.get(number, []) for number in self._survivors})

    def _step(self, repetition: int):
        made = self._made
        for allocator, table, number, size, growth in self._program:
            if table is None:
                made[number] = [allocator.allocate(size + repetition * growth)]
            else:
                for block in table.pop(number):
                    allocator.free(block)
        # What a step leaves replaces what the one before left, or adds to it if that is still held.
        for number, blocks in made.items():
            self._held[number] = self._held.get(number, []) + blocks
        made.clear()

    def _unwind(self):
        """As when a real step fails: what replaced an older block stays, temporaries go."""
        for number, blocks in self._made.items():
            if number in self._survivors and number not in self._held:
                self._held[number] = blocks
            else:
                for block in blocks:
                    self._allocators[self._cards[number]].free(block)

    def _hand_over(self, held: dict[int, list[Block]]):
        for number, survivor in self._survivors.items():
            survivor.places = held[number]
            survivor.bytes = sum(block.size for block in held[number])
