"""What the pictures share: colours, style sheet, line at the capacity, title, legend."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

Picture = TypeVar("Picture")

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
    "unused": "#DDDDDD",  # reserved by PyTorch for later tensors
}
# The line at a capacity.
CAPACITY = {"color": "black", "linewidth": 2.5}


def styled(grid_axis: str = "x"):
    """A ``with`` block in which figures are made in the pictures' style, with a grid on an axis."""
    sheet = Path(__file__).with_name("memory.mplstyle")
    return plt.style.context([sheet, {"axes.grid.axis": grid_axis}])


def finish(
    figure: Figure,
    description: str,
    colours: Mapping[str, str],
    has_capacity: bool = False,
    title: str = "",
    columns: int = 5,
) -> Figure:
    """Title, legend (name to colour) and alternative text. The figure is closed: a notebook shows
    what ends its cell, and would show an open one twice."""
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=14)
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    if has_capacity:
        handles.append(plt.Line2D([], [], label="capacity", **CAPACITY))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=11)
    plt.close(figure)
    return describe(figure, description)


def describe(picture: Picture, alternative: str) -> Picture:
    """The picture, a figure or an image of Pillow, with an alternative text.

    A notebook stores it where IPython and nbconvert have it, in the output's metadata, and as the
    output's plain text.
    """
    kinds = ("image/png",) if isinstance(picture, Figure) else ("image/png", "image/jpeg")
    picture._repr_mimebundle_ = partial(_description, alternative, kinds)
    return picture


def _description(alternative: str, kinds: Sequence[str], **wanted) -> tuple[dict, dict]:
    return {"text/plain": alternative}, {kind: {"alt": alternative} for kind in kinds}


def label_end(axes, end: float, row: float, limits: Sequence[float]):
    """Write a bar's length behind its end; behind the capacity's line where it would cross that."""
    widest = 0.065 * max([end, *limits])  # of five characters, of the axis
    behind = [limit for limit in limits if end - 0.01 * widest <= limit < end + widest]
    axes.text(max([end, *behind]), row, f" {end:.1f}", va="center")
