"""Draws the stored training logs of the miniature: python benchmarks/miniature_curve.py

Reads results/miniature_training*.jsonl and writes results/miniature_training.png.
"""

import json
from pathlib import Path

from glm4v_nb.plots import plot_training_curve

RESULTS = Path(__file__).parent / "results"


def main():
    """Draw every stored log beside the others, in the order of their names."""
    logs = {}
    for number, path in enumerate(sorted(RESULTS.glob("miniature_training*.jsonl")), start=1):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        logs[f"Part {number}: {records[-1]['step']:,} steps of {records[0]['options']['batch_size']}"] = (
            records
        )
    figure = plot_training_curve(logs, f"Training the miniature, {records[0]['parameters']:,} parameters")
    figure.savefig(RESULTS / "miniature_training.png")


if __name__ == "__main__":
    main()
