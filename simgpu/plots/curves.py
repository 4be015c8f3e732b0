"""Peaks that grow with a size, and memory from layer to layer."""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from simgpu.plots.style import CAPACITY, COLOURS, GIB, finish, styled

# Told apart by colour and by shape.
_LOOKS = (("#0072B2", "o"), ("#009E73", "s"), ("#E69F00", "^"), ("#CC79A7", "D"))
_OUT_OF_MEMORY = {"color": "#D55E00", "marker": "X", "markersize": 13, "linestyle": "none"}


def plot_peaks(
    lines: Mapping[str, Mapping[int, int]],
    size: str,
    capacity_bytes: int,
    out_of_memory: Sequence[int] = (),
    title: str = "",
    provenance: str = "simulated",
) -> Figure:
    """Peaks by size, a line per entry of ``lines``: {"text only": {1000: bytes, ...}, ...}.

    At most four lines. ``size`` says what the sizes count; those in ``out_of_memory`` are marked at
    the capacity. The scale does not begin at 0: it shows the lowest peak and the capacity.
    """
    capacity = capacity_bytes / GIB
    with styled("both"):
        figure, axes = plt.subplots(figsize=(9, 4.2))
        for (name, points), (colour, marker) in zip(lines.items(), _LOOKS, strict=False):
            heights = [peak / GIB for peak in points.values()]
            look = {"color": colour, "marker": marker, "markersize": 8, "linewidth": 2.5}
            axes.plot(list(points), heights, label=name, **look)
        axes.axhline(capacity, label="capacity", **CAPACITY)
        if out_of_memory:
            places = [capacity] * len(out_of_memory)
            axes.plot(out_of_memory, places, label="out of memory", zorder=3, **_OUT_OF_MEMORY)
        lowest = min(min(points.values()) for points in lines.values()) / GIB
        margin = 0.08 * (capacity - lowest)
        axes.set_ylim(lowest - margin, capacity + margin)
        axes.set_ylabel("GiB")
        axes.set_xlabel(f"{size} · {provenance}")
        figure.legend(loc="outside lower center", ncols=4, fontsize=11)
        return finish(figure, _lines_in_words(lines, capacity, size, title), {}, title=title)


def plot_layers(
    panels: Mapping[str, Mapping[str, Sequence[int]]],
    sections: Sequence[tuple[str, int]],
    capacity_bytes: int,
    title: str = "",
    provenance: str = "simulated",
) -> Figure:
    """What is on a card after every layer, stacked by purpose, a panel per entry of ``panels``:
    {"plain": {"weights": [bytes after each layer], "gradients": [...]}, ...}.

    ``sections`` name the parts of the horizontal axis and how many layers each has, in order.
    """
    edges = [0, *accumulate(length for _, length in sections)]
    used: dict[str, str] = {}
    with styled("y"):
        figure, row = plt.subplots(
            1, len(panels), sharey=True, squeeze=False, figsize=(5 * len(panels), 4.4)
        )
        for axes, (name, parts) in zip(row[0], panels.items(), strict=True):
            colours = {kind: COLOURS[kind] for kind in parts}
            used |= colours
            heights = [[held / GIB for held in sizes] for sizes in parts.values()]
            axes.stackplot(range(len(heights[0])), heights, colors=colours.values())
            axes.axhline(capacity_bytes / GIB, **CAPACITY)
            for edge in edges[1:-1]:
                axes.axvline(edge - 0.5, color="black", linewidth=0.8, linestyle=":")
            middles = [(begin + end - 1) / 2 for begin, end in zip(edges, edges[1:], strict=False)]
            axes.set_xticks(middles, [section for section, _ in sections], fontsize=11)
            axes.set_xlim(0, edges[-1] - 1)
            axes.set_title(name)
            axes.set_xlabel(f"layer by layer · {provenance}")
        row[0][0].set_ylabel("GiB")
        return finish(figure, _layers_in_words(panels, title), used, True, title)


def _lines_in_words(lines: Mapping, capacity: float, size: str, title: str) -> str:
    said = []
    for name, points in lines.items():
        (first, low), *_, (last, high) = points.items()
        said.append(f"{name}: {low / GIB:.1f} at {first}, {high / GIB:.1f} at {last}")
    return f"Lines in GiB by {size}. {title}. {'; '.join(said)}; capacity {capacity:.1f}."


def _layers_in_words(panels: Mapping, title: str) -> str:
    said = []
    for name, parts in panels.items():
        sizes = [f"{kind} at most {max(held) / GIB:.1f}" for kind, held in parts.items()]
        said.append(f"{name}: {', '.join(sizes)}")
    return f"Stacked areas in GiB, layer by layer. {title}. {'; '.join(said)}."
