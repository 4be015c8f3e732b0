"""Draws the stored training log of the miniature: python benchmarks/miniature_curve.py

Reads results/miniature_training.jsonl and writes results/miniature_training.png.
"""

import json
from pathlib import Path

from glm4v_nb.plots import plot_training_curve

RESULTS = Path(__file__).parent / "results"


def main():
    """Draw loss against time; the title says how much was trained."""
    lines = (RESULTS / "miniature_training.jsonl").read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    size, pictures, steps = log[0]["parameters"], log[0]["options"]["batch_size"], log[-1]["step"]
    title = f"Training {size:,} parameters: {steps:,} steps of {pictures} pictures"
    plot_training_curve(log, title).savefig(RESULTS / "miniature_training.png")


if __name__ == "__main__":
    main()
