"""Pictures of memory, in one style: colour-blind safe colours (Okabe and Ito), readable at half
size.

Functions take plain figures, memory in bytes, return a matplotlib figure, and write its provenance
("simulated" or "measured on ...") under the picture.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from glm4v_nb.placement import PlacedModule

GIB, MIB = 2**30, 2**20
# Okabe & Ito, "Color Universal Design" (2008).
COLOURS = {
    "weights": "#0072B2",
    "tower layer": "#56B4E9",
    "tower other": "#0072B2",
    "decoder layer": "#E69F00",
    "embedding and head": "#D55E00",
    "KV cache": "#009E73",
    "activations": "#CC79A7",
    "gradients": "#F0E442",
    "gradients and activations": "#F0E442",
    "workspace": "#999999",
    "CUDA context": "#666666",
    "requested": "#D55E00",
}
_STYLE = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 96,
    "figure.constrained_layout.use": True,
}


def plot_memory_bars(
    bars: Mapping[str, Mapping[str, int]],
    capacity_bytes: int | Mapping[str, int] | None = None,
    title: str = "",
    provenance: str = "simulated",
) -> Figure:
    """Horizontal stacked bars, one per entry of ``bars``: {"card 0": {"weights": bytes, ...}, ...}.

    ``capacity_bytes`` draws a line at the capacity: one for all bars, or one each.
    """
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(9, 0.62 * len(bars) + 1.6))
        used: dict[str, str] = {}
        for row, parts in enumerate(bars.values()):
            left = 0.0
            for kind, size in parts.items():
                colour = COLOURS.get(kind, "#BBBBBB")
                used[kind] = colour
                axes.barh(row, size / GIB, left=left, color=colour, edgecolor="white", height=0.7)
                left += size / GIB
            axes.text(left, row, f" {left:.1f}", va="center")
            limit = capacity_bytes[list(bars)[row]] if isinstance(capacity_bytes, Mapping) else None
            if limit is not None:
                axes.plot([limit / GIB] * 2, [row - 0.42, row + 0.42], color="black", linewidth=2.5)
        if isinstance(capacity_bytes, int):
            axes.axvline(capacity_bytes / GIB, color="black", linewidth=2.5)
        axes.set_yticks(range(len(bars)), list(bars))
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set_title(title)
        _finish(figure, axes, used, f"GiB · {provenance}", capacity_bytes is not None)
    return figure


def plot_device_map(
    placements: Mapping[str, Sequence[PlacedModule]],
    capacity_bytes: int,
    title: str = "Where every block of the model lives",
    provenance: str = "simulated",
) -> Figure:
    """Layers x cards x bytes: one panel per device map, one row per card, one cell per block in the
    order data flows.

    ``placements`` maps a panel's name to the blocks of ``explain_device_map``; a cell is as wide as
    its bytes.
    """
    with plt.rc_context(_STYLE):
        rows = {
            name: sorted({block.place for block in blocks}, key=str)
            for name, blocks in placements.items()
        }
        figure, panels = plt.subplots(
            len(placements),
            1,
            sharex=True,
            squeeze=False,
            figsize=(10, sum(0.52 * len(row) + 0.45 for row in rows.values()) + 1.5),
            gridspec_kw={"height_ratios": [len(row) + 0.6 for row in rows.values()]},
        )
        used: dict[str, str] = {}
        for axes, (name, blocks) in zip(panels[:, 0], placements.items(), strict=True):
            for row, place in enumerate(rows[name]):
                here = [block for block in blocks if block.place == place]
                _draw_blocks(axes, row, here, used, gib_per_character=capacity_bytes / GIB / 105)
            axes.axvline(capacity_bytes / GIB, color="black", linewidth=2.5)
            labels = [f"card {place}" if isinstance(place, int) else place for place in rows[name]]
            axes.set_yticks(range(len(labels)), labels)
            axes.set_ylim(len(labels) - 0.45, -0.55)
            axes.set_title(name)
        panels[-1, 0].set_xlim(0, capacity_bytes / GIB * 1.04)
        figure.suptitle(title, x=0.01, ha="left", fontsize=14)
        _finish(figure, panels[-1, 0], used, f"GiB of weights · {provenance}", True)
    return figure


def plot_path(path: str | Path) -> Path:
    """The path, if a picture can be written there: asked before the work whose result it shows.

    Raises:
        ValueError: not a kind of picture, or no such folder.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(
            f"The picture is to be {str(path)!r}; expected a name ending in .png, .svg or .pdf."
        )
    if not path.parent.is_dir():
        raise ValueError(
            f"There is no folder {str(path.parent)!r} for the picture {path.name!r}. Make it first."
        )
    return path


def plot_frontier(
    frontiers: Mapping[str, Mapping[int, int]],
    title: str = "What fits: batch size and prompt length",
    provenance: str = "simulated",
) -> Figure:
    """What fits, as steps: up to which batch size at each prompt length, shaded below; one line per
    entry.

    ``frontiers``: name → {text tokens: largest batch that fits}. Between two lengths the line shows
    the smaller of their batches, which is sure to fit.
    """
    colours = [COLOURS[kind] for kind in ("weights", "decoder layer", "KV cache", "activations")]
    with plt.rc_context(_STYLE | {"axes.grid.axis": "both"}):
        figure, axes = plt.subplots(figsize=(9, 4.4))
        used: dict[str, str] = {}
        for (name, found), colour in zip(frontiers.items(), colours, strict=False):
            tokens = sorted(found)
            batches = [found[count] for count in tokens]
            # Each length stands at the right end of its step: a shorter prompt takes no more
            # memory.
            edges = [0, *tokens]
            axes.stairs(batches, edges, color=colour, linewidth=2.5, baseline=None)
            axes.stairs(batches, edges, color=colour, alpha=0.15, fill=True)
            axes.plot(tokens, batches, "o", color=colour)
            for count, batch in zip(tokens, batches, strict=True):
                axes.annotate(
                    f"{batch}", (count, batch), (3, 5), textcoords="offset points", color="black"
                )
            used[name] = colour
        axes.set_yscale("symlog", base=2, linthresh=1)
        axes.yaxis.set_major_formatter("{x:.0f}")
        axes.set_xlim(left=0)
        axes.set_ylim(
            bottom=0, top=1.9 * max(max(found.values()) for found in frontiers.values()) + 1
        )
        axes.set_ylabel("samples at a time")
        axes.set_title(title)
        _finish(figure, axes, used, f"text tokens of the prompt, per sample · {provenance}", False)
    return figure


def plot_training_curve(log: Sequence[Mapping], title: str = "Training") -> Figure:
    """Loss against time. ``log``: the lines of ``miniature.train``; the first names machine,
    versions and date."""
    origin, *steps = log
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(6.2, 3.6))
        minutes = [step["seconds"] / 60 for step in steps]
        axes.plot(minutes, [step["loss"] for step in steps], color=COLOURS["weights"])
        axes.set_yscale("log")
        axes.grid(axis="y", alpha=0.3)
        axes.set_xlabel(
            f"minutes · measured on {origin['device']}\ntorch {origin['torch']}, "
            f"transformers {origin['transformers']}, {origin['date']}"
        )
        axes.set_ylabel("loss per answer token")
        figure.suptitle(title, x=0.01, ha="left", fontsize=14)
        plt.close(figure)
    return figure


def _draw_blocks(
    axes, row: int, blocks: Sequence[PlacedModule], used: dict[str, str], gib_per_character: float
):
    left = 0.0
    for (kind, _), run in groupby(
        blocks, key=lambda block: (block.kind, block.name.rpartition(".")[0])
    ):
        run = list(run)
        start = left
        for block in run:
            used[kind] = COLOURS[kind]
            axes.barh(
                row,
                block.bytes / GIB,
                left=left,
                color=COLOURS[kind],
                edgecolor="white",
                linewidth=0.5,
            )
            left += block.bytes / GIB
        if kind.endswith("layer"):
            numbers = [block.name.rpartition(".")[2] for block in run]
            long, short = f"{kind}s {numbers[0]}–{numbers[-1]}", f"{numbers[0]}–{numbers[-1]}"
            text = long if len(long) * gib_per_character < left - start else short
            if len(text) * gib_per_character < left - start:
                axes.text((start + left) / 2, row, text, ha="center", va="center", fontsize=10.5)
    axes.text(left, row, f" {left:.1f}", va="center")


def _finish(figure: Figure, axes, used: Mapping[str, str], label: str, has_capacity: bool):
    axes.set_xlabel(label)
    handles = [Patch(color=colour, label=kind) for kind, colour in used.items()]
    if has_capacity:
        handles.append(plt.Line2D([], [], color="black", linewidth=2.5, label="capacity"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=11)
    plt.close(
        figure
    )  # Returned, not shown twice: a notebook displays the figure that ends its cell.
