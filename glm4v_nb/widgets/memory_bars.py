"""``MemoryBars``: one bar per card, moved by a ``Monitor`` while a program runs."""

import time
from dataclasses import fields

import ipywidgets as widgets

from glm4v_nb.widgets import html
from simgpu import CardMemory

REFRESH_SECONDS = 0.1


class MemoryBars(widgets.VBox):
    """Dark what PyTorch has reserved, light its peak in this stage; the stage's name above.

    Give ``update`` to ``Monitor(..., on_sample=...)`` and show the object as the last line of a
    cell. Only the value of a widget is changed, which is safe from the monitor's thread.
    ``close()`` takes the bars off the page.
    """

    def __init__(self, rig):
        self._bars = widgets.HTML(html.memory_bars(rig.memory(), rig.provenance))
        self._stage = widgets.HTML(html.note("not running"))
        self._shown = 0.0
        self._waiting: dict | None = None
        super().__init__([widgets.HTML(html.STYLE), self._stage, self._bars])

    def __repr__(self):  # stored in a notebook instead of the widget; ipywidgets' lists every trait
        return "MemoryBars()"

    def update(self, sample: dict):
        """Show a monitor's sample, unless the same stages were shown less than 0.1 s ago."""
        again = self._waiting and self._waiting["stages"] == sample["stages"]
        self._waiting = sample
        if not again or time.monotonic() - self._shown >= REFRESH_SECONDS:
            self.show()

    def show(self):
        """Show the latest sample now."""
        sample = self._waiting
        if sample is None:
            return
        self._shown = time.monotonic()
        names = [field.name for field in fields(CardMemory)]
        memory = [CardMemory(*(card[name] for name in names)) for card in sample["cards"]]
        self._stage.value = html.note(" › ".join(sample["stages"]) or "between stages")
        self._bars.value = html.memory_bars(memory, sample["provenance"])
