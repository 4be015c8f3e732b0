"""Memory over time: what a ``Monitor`` sampled, stacked by purpose, one panel per card."""

from collections.abc import Sequence
from itertools import groupby

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from glm4v_nb.plots import _STYLE, COLOURS, GIB, MIB

# From the bottom up. The first two are there before the program does anything.
PARTS = {
    "other processes": "#000000",
    "CUDA context": COLOURS["CUDA context"],
    "outside PyTorch": COLOURS["CUDA context"],
    "weights": COLOURS["weights"],
    "KV cache": COLOURS["KV cache"],
    "workspace": COLOURS["workspace"],
    "activations": COLOURS["activations"],
    "reserved, unused": "#DDDDDD",
}
BETWEEN = ""  # where no stage is running
COLUMNS = (
    600  # a sample narrower than one of these is still drawn this wide, or a peak would not be seen
)


def parts_of(card: dict) -> dict[str, int]:
    """One card of a sample by purpose, in bytes, from the bottom of the picture up; empty parts are
    left out.

    "weights", "KV cache", "workspace" and "activations" sum to ``allocated_bytes``, with "reserved,
    unused" to ``reserved_bytes``, and all parts to ``used_bytes`` where it is known. Where this
    process cannot be told from others, their bytes and the CUDA context's are one part, "outside
    PyTorch".
    """
    used, own, reserved = card["used_bytes"], card["own_bytes"], card["reserved_bytes"]
    if own is None:
        outside = {"outside PyTorch": max(0, (used or 0) - reserved)}
    else:
        outside = {
            "other processes": card["others_bytes"] or 0,
            "CUDA context": max(0, own - reserved),
        }
    parts = outside | {
        "weights": card["weights_bytes"],
        "KV cache": card["kv_cache_bytes"],
        "workspace": card["workspace_bytes"] or 0,
        "activations": card["activations_bytes"],
        "reserved, unused": reserved - card["allocated_bytes"],
    }
    return {name: size for name, size in parts.items() if size}


def plot_timeline(
    samples: Sequence[dict], title: str = "Memory over time", only: Sequence[str] | None = None
) -> Figure:
    """Stacked memory of every card over a run, with capacity and stage names.

    On real devices the horizontal axis is seconds. Simulated cards have no clock: every stage is
    drawn equally wide, and inside it one unit is one allocation or release.

    Args:
        samples: as ``memory.monitor.read_samples`` returns them, of one process.
        only: the parts to stack, as ``parts_of`` names them, on a scale of their own without the
            capacity; what takes little beside the weights can be seen so. By default all.

    Raises:
        ValueError: no samples, or those of several processes.
    """
    if not samples:
        raise ValueError(
            "There are no samples. Expected at least one; did the monitor's block end?"
        )
    if len({sample["process"] for sample in samples}) > 1:
        raise ValueError(
            "The samples are of several processes, whose memory does not add up over time. Expected"
            " those of one: choose by sample['process']."
        )
    cards = samples[0]["cards"]
    simulated = samples[0]["event"] is not None
    places, spans = _places(samples, simulated)
    with plt.rc_context(_STYLE | {"axes.grid.axis": "y"}):
        figure, panels = plt.subplots(
            len(cards),
            1,
            sharex=True,
            sharey=only is not None,
            squeeze=False,
            figsize=(10, 2.3 * len(cards) + 1.6),
        )
        used: set[str] = set()
        unit = _unit(samples, only)
        for axes, index in zip(panels[:, 0], range(len(cards)), strict=True):
            used |= _draw_card(
                axes, [sample["cards"][index] for sample in samples], places, only, unit
            )
            for _, begin, end in spans:
                axes.axvline(begin, color="black", linewidth=0.8, linestyle=":")
                axes.axvline(end, color="black", linewidth=0.8, linestyle=":")
        _name_stages(panels[0, 0], spans, places[-1] - places[0])
        if simulated:
            panels[-1, 0].set_xticks([])
        progress = "allocations and releases, stages equally wide" if simulated else "seconds"
        panels[-1, 0].set_xlabel(f"{progress} · {samples[0]['provenance']}", fontsize=11)
        figure.suptitle(title, x=0.01, ha="left", fontsize=14)
        handles = [
            Patch(color=colour, label=name) for name, colour in PARTS.items() if name in used
        ]
        if only is None:
            handles.append(plt.Line2D([], [], color="black", linewidth=2.5, label="capacity"))
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=11)
        plt.close(
            figure
        )  # Returned, not shown twice: a notebook displays the figure that ends its cell.
    return figure


def _unit(samples: Sequence[dict], only: Sequence[str] | None) -> tuple[str, int]:
    """Name and bytes of the unit in which the chosen parts read well; with the capacity it is
    always GiB."""
    highest = max(
        sum(size for name, size in parts_of(card).items() if name in (only or ()))
        for sample in samples
        for card in sample["cards"]
    )
    return ("GiB", GIB) if only is None or highest >= GIB else ("MiB", MIB)


def _draw_card(
    axes, cards: list[dict], places: list[float], only: Sequence[str] | None, unit: tuple[str, int]
) -> set[str]:
    """Stack one card's parts, in a unit given by name and bytes; returns the names of those
    drawn."""
    unit_name, unit_bytes = unit
    chosen, edges = _largest_by_column(cards, places)
    split = [parts_of(card) for card in chosen]
    names = [name for name in only or PARTS if any(name in parts for parts in split)]
    bottom = [0.0] * len(chosen)
    for name in names:
        top = [
            low + parts.get(name, 0) / unit_bytes for low, parts in zip(bottom, split, strict=True)
        ]
        axes.fill_between(edges, bottom, top, step="post", color=PARTS[name], linewidth=0)
        bottom = top
    highest = max(bottom)
    label = (
        "host" if cards[0]["card"] == "host" else f"GPU {cards[0]['index']} · {cards[0]['card']}"
    )
    if only is None:
        highest = capacity = cards[0]["capacity_bytes"] / unit_bytes
        axes.axhline(capacity, color="black", linewidth=2.5)
        label += (
            f" · largest sample {max(card['allocated_bytes'] for card in cards) / GIB:.1f} GiB"
            " allocated"
        )
    axes.set_ylim(
        0, max(highest * 1.25, axes.get_ylim()[1] if only else 0) or 1
    )  # room for the stages' names
    axes.set_xlim(places[0], max(places[-1], places[0] + 1e-6))
    axes.set_ylabel(unit_name)
    axes.set_title(label, fontsize=12)
    return set(names)


def _largest_by_column(cards: list[dict], places: list[float]) -> tuple[list[dict], list[float]]:
    """Of the samples that share a column of the picture the one with most allocated, and where
    columns begin."""
    width = (places[-1] - places[0]) / COLUMNS or 1.0
    columns: dict[int, list[dict]] = {}
    for card, place in zip(cards, places, strict=True):
        columns.setdefault(int((place - places[0]) / width), []).append(card)
    chosen, edges, before = [], [], None
    for column in range(max(columns) + 1):
        here = columns.get(column)
        chosen.append(max(here, key=lambda card: card["allocated_bytes"]) if here else before)
        edges.append(places[0] + column * width)
        before = here[-1] if here else before
    return chosen, edges


def _name_stages(axes, spans: list[tuple[str, float, float]], width: float):
    for name, begin, end in spans:
        if end - begin >= 0.05 * width:
            axes.text(
                (begin + end) / 2,
                0.97,
                name,
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="top",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
            )


def _places(
    samples: Sequence[dict], simulated: bool
) -> tuple[list[float], list[tuple[str, float, float]]]:
    """Where each sample stands on the horizontal axis, and begin and end of every stage there."""
    begin = samples[0]["time"]
    places: list[float] = []
    spans: list[tuple[str, float, float]] = []
    left = 0.0
    numbered = list(enumerate(samples))
    for name, run in groupby(numbered, key=lambda pair: (pair[1]["stages"] or [BETWEEN])[-1]):
        run = [number for number, _ in run]
        following = min(run[-1] + 1, len(samples) - 1)
        if simulated:
            first, last = samples[run[0]]["event"], samples[following]["event"]
            width = 0.0 if name == BETWEEN else 1.0
            scale = width / max(1, last - first)
            places += [left + (samples[number]["event"] - first) * scale for number in run]
            end = left + width
        else:
            places += [samples[number]["time"] - begin for number in run]
            end = samples[following]["time"] - begin
        if name != BETWEEN:
            spans.append((name, left if simulated else places[-len(run)], end))
        left = end
    return places, spans
