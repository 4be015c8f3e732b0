"""Draws the stored training log of the miniature: python benchmarks/miniature_curve.py

Reads results/miniature_training.jsonl and writes results/miniature_training.png.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from simgpu.plots.style import COLOURS, finish, styled

RESULTS = Path(__file__).parent / "results"


def plot_training_curve(log: Sequence[Mapping], title: str = "Training") -> Figure:
    """Loss against time. ``log``: the lines of ``tools/miniature/train.py``, of which the first
    names machine, versions and date."""
    origin, *steps = log
    with styled():
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
        return finish(figure, title, {}, title=title)


def main():
    """Draw loss against time; the title says how much was trained."""
    lines = (RESULTS / "miniature_training.jsonl").read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    size, pictures, steps = log[0]["parameters"], log[0]["options"]["batch_size"], log[-1]["step"]
    title = f"Training {size:,} parameters: {steps:,} steps of {pictures} pictures"
    plot_training_curve(log, title).savefig(RESULTS / "miniature_training.png")


if __name__ == "__main__":
    main()
