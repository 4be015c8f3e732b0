"""The numbers that four bits can say, over the weights that they stand for."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from simgpu.plots.style import COLOURS, finish, styled


def plot_levels(
    weights: Sequence[float], levels: Mapping[str, Sequence[float]], title: str = ""
) -> Figure:
    """A histogram of scaled weights, -1 to 1, and under it a row of strokes for each format:
    {"int4": the numbers it has, ...}."""
    with styled():
        figure, (above, below) = plt.subplots(
            2, sharex=True, figsize=(9, 2.6 + 0.5 * len(levels)), height_ratios=[3, len(levels)]
        )
        above.hist(np.asarray(weights), bins=81, range=(-1, 1), color=COLOURS["weights"])
        above.set_yticks([])
        above.set_title(title)
        for row, values in enumerate(levels.values()):
            colour = COLOURS["requested"]
            below.vlines(values, row - 0.35, row + 0.35, color=colour, linewidth=2.5)
        below.set_yticks(range(len(levels)), list(levels))
        below.set_ylim(len(levels) - 0.5, -0.5)
        below.set_xlabel("weight, divided by the largest of its group · computed")
        said = [f"{name} has {len(values)}" for name, values in levels.items()]
        words = f"A histogram of weights, and strokes where a format has numbers: {'; '.join(said)}"
        return finish(figure, f"{words}. {title}.", {})
