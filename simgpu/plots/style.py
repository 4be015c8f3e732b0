"""What the pictures share: colours, style sheet, line at the capacity, title, legend."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

GIB, MIB = 2**30, 2**20
# Okabe & Ito, "Color Universal Design" (2008): told apart by the colour-blind.
COLOURS = {
    "weights": "#0072B2",
    "parameters": "#0072B2",
    "tower layer": "#56B4E9",
    "tower other": "#0072B2",
    "decoder layer": "#E69F00",
    "embedding and head": "#D55E00",
    "KV cache": "#009E73",
    "activations": "#CC79A7",
    "gradients": "#F0E442",
    "optimizer": "#E69F00",
    "gradients and activations": "#F0E442",
    "workspace": "#999999",
    "CUDA context": "#666666",
    "requested": "#D55E00",
}
# The line at a capacity.
CAPACITY = {"color": "black", "linewidth": 2.5}


def styled(grid_axis: str = "x"):
    """A ``with`` block in which figures are made in the pictures' style, with a grid on an axis."""
    sheet = Path(__file__).with_name("memory.mplstyle")
    return plt.style.context([sheet, {"axes.grid.axis": grid_axis}])


def finish(
    figure: Figure,
    colours: Mapping[str, str],
    has_capacity: bool = False,
    title: str = "",
    columns: int = 5,
) -> Figure:
    """Title and legend, name to colour. The figure is closed: a notebook shows what ends its cell,
    and would show an open one twice."""
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=14)
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    if has_capacity:
        handles.append(plt.Line2D([], [], label="capacity", **CAPACITY))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=11)
    plt.close(figure)
    return figure
