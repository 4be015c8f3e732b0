"""Memory over time: what a ``Monitor`` sampled, stacked by purpose, one panel per card."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from simgpu.plots.style import CAPACITY, COLOURS, GIB, MIB, finish, styled

# From the bottom up. The first three are there before the program does anything.
PURPOSES = {
    "other processes": "#000000",
    "CUDA context": COLOURS["CUDA context"],
    "outside PyTorch": COLOURS["CUDA context"],
    "weights": COLOURS["weights"],
    "KV cache": COLOURS["KV cache"],
    "workspace": COLOURS["workspace"],
    "activations": COLOURS["activations"],
    "reserved, unused": COLOURS["unused"],
}
# A narrower sample is still drawn as wide as one of so many columns, or a peak would not be seen.
COLUMNS = 600


def memory_by_purpose(card: dict) -> dict[str, int]:
    """One card of a sample by purpose, in bytes, from the bottom up; empty ones are left out.

    "weights", "KV cache", "workspace" and "activations" sum to ``allocated_bytes``, with "reserved,
    unused" to ``reserved_bytes``, and all purposes to ``used_bytes`` where it is known. Where this
    process cannot be told from others, their bytes and the CUDA context's are one, "outside
    PyTorch".
    """
    used, own, reserved = card["used_bytes"], card["own_bytes"], card["reserved_bytes"]
    sizes = {
        "other processes": 0 if own is None else card["others_bytes"] or 0,
        "CUDA context": 0 if own is None else max(0, own - reserved),
        "outside PyTorch": max(0, (used or 0) - reserved) if own is None else 0,
        "weights": card["weights_bytes"],
        "KV cache": card["kv_cache_bytes"],
        "workspace": card["workspace_bytes"] or 0,
        "activations": card["activations_bytes"],
        "reserved, unused": reserved - card["allocated_bytes"],
    }
    return {purpose: size for purpose, size in sizes.items() if size}


def plot_timeline(
    samples: Sequence[dict], title: str = "Memory over time", only: Sequence[str] | None = None
) -> Figure:
    """Stacked memory of every card over a run, with capacity and stage names.

    On real devices the horizontal axis is seconds. Simulated cards have no clock: every stage is
    drawn equally wide, and inside it one unit is one allocation or release.

    Args:
        samples: as ``simgpu.monitor.read_samples`` returns them; ValueError if of several
            processes, or none.
        only: the purposes to stack, as ``memory_by_purpose`` names them, on a scale of their own
            without the capacity, for what takes little beside the weights; by default all.
    """
    if not samples:
        raise ValueError("There are no samples. Expected some; did the monitor's block end?")
    if len({sample["process"] for sample in samples}) > 1:
        raise ValueError(
            "The samples are of several processes, whose memory does not add up over time. Expected"
            " those of one: choose by sample['process']."
        )
    cards = [[sample["cards"][n] for sample in samples] for n in range(len(samples[0]["cards"]))]
    places, stages = _places(samples)
    used: set[str] = set()
    with styled("y"):
        figure, panels = plt.subplots(
            len(cards), sharex=True, sharey=only is not None, squeeze=False,
            figsize=(10, 2.3 * len(cards) + 1.6),
        )  # fmt: skip
        for axes, samples_of_card in zip(panels[:, 0], cards, strict=True):
            used |= _draw_card(axes, samples_of_card, places, only, _unit(cards, only))
            for _, begin, end in stages:
                for border in (begin, end):
                    axes.axvline(border, color="black", linewidth=0.8, linestyle=":")
        _name_stages(panels[0, 0], stages, places[-1] - places[0])
        progress = "seconds"
        if samples[0]["event"] is not None:  # simulated
            axes.set_xticks([])
            progress = "allocations and releases, stages equally wide"
        axes.set_xlabel(f"{progress} · {samples[0]['provenance']}", fontsize=11)
        colours = {name: colour for name, colour in PURPOSES.items() if name in used}
        description = f"{title}: {', '.join(colours)} stacked over {progress}. " + " ".join(
            f"{axes.get_title()}." for axes in panels[:, 0]
        )
        return finish(figure, description, colours, only is None, title, columns=4)


def _unit(cards: list[list[dict]], only: Sequence[str] | None) -> tuple[str, int]:
    """Name and bytes of the unit in which the chosen purposes read well; GiB for all."""
    split = [memory_by_purpose(card) for samples in cards for card in samples]
    highest = max(sum(sizes.get(name, 0) for name in set(only or ())) for sizes in split)
    return ("GiB", GIB) if only is None or highest >= GIB else ("MiB", MIB)


def _draw_card(
    axes, cards: list[dict], places: list[float], only: Sequence[str] | None, unit: tuple[str, int]
) -> set[str]:
    """Stack one card's purposes, in a unit of this name and bytes; returns those drawn."""
    unit_name, unit_bytes = unit
    chosen, edges = _largest_by_column(cards, places)
    split = [memory_by_purpose(card) for card in chosen]
    names = [name for name in only or PURPOSES if any(name in sizes for sizes in split)]
    bottom = [0.0] * len(chosen)
    for name in names:
        sizes = [by_purpose.get(name, 0) / unit_bytes for by_purpose in split]
        top = [low + size for low, size in zip(bottom, sizes, strict=True)]
        axes.fill_between(edges, bottom, top, step="post", color=PURPOSES[name], linewidth=0)
        bottom = top
    highest, drawn_before = max(bottom), axes.get_ylim()[1] if only else 0
    card = cards[0]
    label = "host" if card["card"] == "host" else f"GPU {card['index']} · {card['card']}"
    if only is None:
        highest = card["capacity_bytes"] / unit_bytes
        axes.axhline(highest, **CAPACITY)
        largest = max(card["allocated_bytes"] for card in cards) / GIB
        label += f" · largest sample {largest:.1f} GiB allocated"
    axes.set_ylim(0, max(highest * 1.25, drawn_before) or 1)  # room for the stages' names
    axes.set_xlim(places[0], max(places[-1], places[0] + 1e-6))
    axes.set_ylabel(unit_name)
    axes.set_title(label, fontsize=12)
    return set(names)


def _largest_by_column(cards: list[dict], places: list[float]) -> tuple[list[dict], list[float]]:
    """The fullest of the samples that share a column, and where columns begin."""
    width = (places[-1] - places[0]) / COLUMNS or 1.0
    columns: dict[int, list[dict]] = defaultdict(list)
    for card, place in zip(cards, places, strict=True):
        columns[int((place - places[0]) / width)].append(card)
    chosen = []
    for column in range(max(columns) + 1):
        here = columns[column] = columns[column] or columns[column - 1][-1:]
        chosen.append(max(here, key=lambda card: card["allocated_bytes"]))
    return chosen, [places[0] + column * width for column in range(len(chosen))]


def _name_stages(axes, stages: list[tuple[str, float, float]], width: float):
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
    look = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "top", "bbox": box}
    for name, begin, end in stages:
        if end - begin >= 0.05 * width:
            axes.text((begin + end) / 2, 0.97, name, **look)


def _places(samples: Sequence[dict]) -> tuple[list[float], list[tuple[str, float, float]]]:
    """Where each sample stands on the horizontal axis, and name, begin and end of every stage."""
    simulated = samples[0]["event"] is not None
    clock = "event" if simulated else "time"
    places: list[float] = []
    stages: list[tuple[str, float, float]] = []
    end = 0.0
    for name, run in groupby(samples, key=lambda sample: (sample["stages"] or [""])[-1]):
        times = [sample[clock] for sample in run]
        following = samples[min(len(places) + len(times), len(samples) - 1)][clock]
        begin, scale, width = end, 1.0, following - times[0]
        if simulated:
            width = 1.0 if name else 0.0  # nothing between stages
            scale = width / max(1, following - times[0])
        else:
            begin = times[0] - samples[0][clock]
        end = begin + width
        places += [begin + (time - times[0]) * scale for time in times]
        if name:
            stages.append((name, begin, end))
    return places, stages
