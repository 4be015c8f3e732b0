"""Memory of a moment as stacked bars, and what fits."""

import os
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from simgpu.plots.style import CAPACITY, COLOURS, GIB, finish, label_end, styled


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
    limits = capacity_bytes if isinstance(capacity_bytes, Mapping) else {}
    if isinstance(capacity_bytes, int):
        limits = dict.fromkeys(bars, capacity_bytes)
    with styled():
        figure, axes = plt.subplots(figsize=(9, 0.62 * len(bars) + 1.6))
        for row, (name, parts) in enumerate(bars.items()):
            left = 0.0
            for kind, size in parts.items():
                used[kind] = colour = COLOURS.get(kind, "#BBBBBB")
                axes.barh(row, size / GIB, left=left, color=colour, edgecolor="white", height=0.7)
                left += size / GIB
            label_end(axes, left, row, [limits[name] / GIB] if limits else [])
            if isinstance(capacity_bytes, Mapping):
                axes.plot([limits[name] / GIB] * 2, [row - 0.42, row + 0.42], **CAPACITY)
        if isinstance(capacity_bytes, int):
            axes.axvline(capacity_bytes / GIB, **CAPACITY)
        axes.set_yticks(range(len(bars)), list(bars))
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set_title(title)
        axes.set_xlabel(f"GiB · {provenance}")
        return finish(figure, _bars_in_words(bars, limits, title), used, bool(limits))


def _bars_in_words(bars: Mapping, limits: Mapping, title: str) -> str:
    said = []
    for name, parts in bars.items():
        sizes = [f"{kind} {size / GIB:.1f}" for kind, size in parts.items()]
        sizes += [f"capacity {limits[name] / GIB:.1f}"] if limits else []
        said.append(f"{name}: {', '.join(sizes)}")
    return f"Stacked bars in GiB. {title}. {'; '.join(said)}."


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
        fits = [
            f"{name}: {', '.join(f'{batch} of {length} tokens' for length, batch in each.items())}"
            for name, each in frontiers.items()
        ]
        description = f"Steps. {title}. Largest batch by prompt length. {'; '.join(fits)}."
        return finish(figure, description, used)


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
