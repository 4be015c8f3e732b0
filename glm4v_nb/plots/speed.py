"""Tokens a second: rung by rung beside a limit, and by the size of a batch."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from simgpu.plots.style import CAPACITY, COLOURS, finish, styled

_POINTS = {"color": COLOURS["requested"], "marker": "o", "markersize": 8, "linestyle": "none"}


def plot_rungs(
    speeds: Mapping[str, float], limit: float, title: str = "", provenance: str = "measured"
) -> Figure:
    """A bar a way of decoding, {"fast": tokens a second, ...}, and a line at what memory allows."""
    with styled():
        figure, axes = plt.subplots(figsize=(9, 0.55 * len(speeds) + 1.7))
        axes.barh(range(len(speeds)), speeds.values(), color=COLOURS["weights"], height=0.7)
        for row, speed in enumerate(speeds.values()):
            look = {"color": "white", "ha": "right"} if speed > limit / 2 else {}
            axes.text(speed, row, f" {speed:.0f} ", va="center", **look)
        axes.axvline(limit, label="limit", **CAPACITY)
        axes.text(limit, -0.6, f"limit {limit:.0f} ", ha="right")
        axes.set_yticks(range(len(speeds)), list(speeds))
        axes.set_ylim(len(speeds) - 0.5, -0.85)
        axes.set_xlim(0, 1.05 * limit)
        axes.set_title(title)
        axes.set_xlabel(f"tokens a second\n{provenance}", fontsize="small")
        said = ", ".join(f"{name} {speed:.1f}" for name, speed in speeds.items())
        words = f"Bars: tokens a second. {title}. {said}; limit {limit:.1f}."
        return finish(figure, words, {})


def plot_batches(
    limits: Mapping[str, Mapping[int, float]],
    measured: Mapping[int, float],
    title: str = "",
    provenance: str = "measured",
) -> Figure:
    """Tokens a second of all samples together, by the size of the batch; both scales logarithmic.

    ``limits``: at most three lines, {"memory": {1: tokens a second, ...}, ...}; ``measured`` are
    points.
    """
    kinds = ("weights", "KV cache", "activations")
    with styled("both"):
        figure, axes = plt.subplots(figsize=(9, 4.2))
        for (name, line), kind in zip(limits.items(), kinds, strict=False):
            axes.plot(list(line), line.values(), label=name, color=COLOURS[kind], linewidth=2.5)
        axes.plot(list(measured), measured.values(), label="measured", **_POINTS)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_ylabel("tokens a second, all samples")
        axes.set_xlabel(f"samples in a batch\n{provenance}", fontsize="small")
        figure.legend(loc="outside lower center", ncols=4, fontsize=11)
        said = []
        for name, line in (*limits.items(), ("measured", measured)):
            (first, low), (last, high) = (list(line.items())[end] for end in (0, -1))
            said.append(f"{name}: {low:,.0f} at {first}, {high:,.0f} at {last}")
        words = f"Lines: tokens a second by the size of a batch. {title}. {'; '.join(said)}."
        return finish(figure, words, {}, title=title)
