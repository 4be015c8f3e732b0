"""Memory of a moment: stacked bars, the blocks of a device map, and what fits."""

import os
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from glm4v_nb.placement import PlacedModule
from glm4v_nb.plots.style import CAPACITY, COLOURS, GIB, finish, styled


def plot_memory_bars(
    bars: Mapping[str, Mapping[str, int]],
    capacity_bytes: int | Mapping[str, int] | None = None,
    title: str = "",
    provenance: str = "simulated",
) -> Figure:
    """Horizontal stacked bars, one per entry of ``bars``: {"card 0": {"weights": bytes, ...}, ...}.

    ``capacity_bytes`` draws a line at the capacity: one for all bars, or one each.
    """
    used: dict[str, str] = {}
    with styled():
        figure, axes = plt.subplots(figsize=(9, 0.62 * len(bars) + 1.6))
        for row, (name, parts) in enumerate(bars.items()):
            left = 0.0
            for kind, size in parts.items():
                used[kind] = colour = COLOURS.get(kind, "#BBBBBB")
                axes.barh(row, size / GIB, left=left, color=colour, edgecolor="white", height=0.7)
                left += size / GIB
            axes.text(left, row, f" {left:.1f}", va="center")
            if isinstance(capacity_bytes, Mapping):
                limit = capacity_bytes[name] / GIB
                axes.plot([limit] * 2, [row - 0.42, row + 0.42], **CAPACITY)
        if isinstance(capacity_bytes, int):
            axes.axvline(capacity_bytes / GIB, **CAPACITY)
        axes.set_yticks(range(len(bars)), list(bars))
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set_title(title)
        axes.set_xlabel(f"GiB · {provenance}")
        return finish(figure, used, capacity_bytes is not None)


def plot_device_map(
    placements: Mapping[str, Sequence[PlacedModule]],
    capacity_bytes: int,
    title: str = "Where every block of the model lives",
    provenance: str = "simulated",
) -> Figure:
    """Layers x cards x bytes: a panel per device map, a row per card, a cell per block.

    ``placements``: panel's name → blocks of ``explain_device_map``; a cell is as wide as its bytes.
    """
    places = {name: {block.place for block in blocks} for name, blocks in placements.items()}
    rows = {name: sorted(found, key=str) for name, found in places.items()}
    used: dict[str, str] = {}
    with styled():
        figure, panels = plt.subplots(
            len(placements),
            sharex=True,
            squeeze=False,
            figsize=(10, sum(0.52 * len(row) + 0.45 for row in rows.values()) + 1.5),
            height_ratios=[len(row) + 0.6 for row in rows.values()],
        )
        for axes, (name, blocks) in zip(panels[:, 0], placements.items(), strict=True):
            for row, place in enumerate(rows[name]):
                here = [block for block in blocks if block.place == place]
                _draw_blocks(axes, row, here, gib_per_character=capacity_bytes / GIB / 105)
                used |= {block.kind: COLOURS[block.kind] for block in here}
            axes.axvline(capacity_bytes / GIB, **CAPACITY)
            labels = [f"card {place}" if isinstance(place, int) else place for place in rows[name]]
            axes.set_yticks(range(len(labels)), labels)
            axes.set_ylim(len(labels) - 0.45, -0.55)
            axes.set_title(name)
        axes.set_xlim(0, capacity_bytes / GIB * 1.04)
        axes.set_xlabel(f"GiB of weights · {provenance}")
        return finish(figure, used, True, title)


def _draw_blocks(axes, row: int, blocks: Sequence[PlacedModule], gib_per_character: float):
    """One row: cells as wide as the blocks' bytes, with the layers' numbers where there is room."""
    left = 0.0
    look = {"edgecolor": "white", "linewidth": 0.5}
    series = groupby(blocks, key=lambda block: (block.kind, block.name.rpartition(".")[0]))
    for (kind, _), series_blocks in series:
        start, numbers = left, []
        for block in series_blocks:
            axes.barh(row, block.bytes / GIB, left=left, color=COLOURS[kind], **look)
            left += block.bytes / GIB
            numbers.append(block.name.rpartition(".")[2])
        if kind.endswith("layer"):
            span = f"{numbers[0]}–{numbers[-1]}"
            for text in (f"{kind}s {span}", span):
                if len(text) * gib_per_character < left - start:
                    middle = (start + left) / 2
                    axes.text(middle, row, text, ha="center", va="center", fontsize=10.5)
                    break
    axes.text(left, row, f" {left:.1f}", va="center")


def plot_frontier(
    frontiers: Mapping[str, Mapping[int, int]],
    title: str = "What fits: batch size and prompt length",
    provenance: str = "simulated",
) -> Figure:
    """What fits, as steps: up to which batch size at each prompt length; one line per entry.

    ``frontiers``: name → {text tokens: largest batch that fits}. Between two lengths the line shows
    the smaller of their batches, which is sure to fit.
    """
    kinds = ("weights", "decoder layer", "KV cache", "activations")
    used = {name: COLOURS[kind] for name, kind in zip(frontiers, kinds, strict=False)}
    with styled("both"):
        figure, axes = plt.subplots(figsize=(9, 4.4))
        for name, colour in used.items():
            tokens = sorted(frontiers[name])
            batches = [frontiers[name][count] for count in tokens]
            # A length stands at the right end of its step: a shorter prompt takes no more memory.
            edges = [0, *tokens]
            axes.stairs(batches, edges, color=colour, linewidth=2.5, baseline=None)
            axes.stairs(batches, edges, color=colour, alpha=0.15, fill=True)
            axes.plot(tokens, batches, "o", color=colour)
            above = {"xytext": (3, 5), "textcoords": "offset points", "color": "black"}
            for point in zip(tokens, batches, strict=True):
                axes.annotate(f"{point[1]}", point, **above)
        axes.set_yscale("symlog", base=2, linthresh=1)
        axes.yaxis.set_major_formatter("{x:.0f}")
        axes.set_xlim(left=0)
        most = max(max(found.values()) for found in frontiers.values())
        axes.set_ylim(bottom=0, top=1.9 * most + 1)
        axes.set_ylabel("samples at a time")
        axes.set_title(title)
        axes.set_xlabel(f"text tokens of the prompt, per sample · {provenance}")
        return finish(figure, used)


def plot_path(path: str | Path) -> Path:
    """The path, if a picture can be written there, else ValueError; asked before a long search."""
    path, folder = Path(path), str(Path(path).parent)
    if path.suffix not in (".png", ".svg", ".pdf"):
        expected = "expected a name ending in .png, .svg or .pdf."
        raise ValueError(f"The picture is to be {str(path)!r}; {expected}")
    if not os.path.isdir(folder):
        raise ValueError(f"There is no folder {folder!r} for the picture {path.name!r}. Make it.")
    is_new = not os.path.exists(path)
    try:
        with open(path, "ab"):
            pass
    except OSError as error:
        reason = f"The picture {str(path)!r} cannot be written: {error.strerror}."
        raise ValueError(f"{reason} Give a file in a folder that is yours.") from None
    if is_new:
        path.unlink()
    return path
