"""What fits on which cards with which weights, by running: ``python -m tools.quantised_choices``.

Full size on simulated cards, one image and 98 tokens of text, 128 new ones. Where that fits: the
most samples at a time, and the longest text beside the image. Writes
benchmarks/results/simulated/quantised_choices.json, which notebook 11 shows; takes ten minutes.
"""

import argparse
import json
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from glm4v_nb.fit import Deployment
from glm4v_nb.workload import Workload
from simgpu.limits import Trials, largest_batch, longest_context

RESULT = Path(__file__).resolve().parents[1] / "benchmarks/results/simulated/quantised_choices.json"
WORKLOAD = Workload(images=1, text_tokens=98, new_tokens=128)
# Cards, their number, and the data type of what is not quantised: a T4 has no bfloat16.
CARDS = {
    "one 24 GB card": ("L4", 1, "bfloat16"),
    "two 24 GB cards": ("L4", 2, "bfloat16"),
    "two T4": ("T4", 2, "float16"),
    "one 80 GB card": ("A100-80", 1, "bfloat16"),
}
WEIGHTS = (None, "int8", "int4", "nf4")


def choice(card: str, count: int, dtype: str, weights: str | None) -> dict:
    """One answer: "verdict" ("fits", "oom", or "refused" with why), peaks and rooms of each card in
    bytes; if it fits, the largest batch and the longest text."""
    try:
        trials = Trials(Deployment(card, count, dtype, weights=weights))
        result = trials.run(WORKLOAD)
    except ValueError as error:
        return {"verdict": "refused", "why": str(error)}
    found = {"verdict": result.verdict, "devices": [asdict(each) for each in result.devices]}
    if result.oom is not None:
        return found | {"phase": result.oom.phase}
    found["largest_batch"] = largest_batch(trials, WORKLOAD).size
    found["longest_text"] = longest_context(trials, WORKLOAD).size
    return found


def main():
    """Try every choice, print and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULT)
    options, rows = parser.parse_args(), []
    for place, (card, count, dtype) in CARDS.items():
        for weights in WEIGHTS:
            begin = time.monotonic()
            row = {"place": place, "card": card, "count": count, "dtype": dtype, "weights": weights}
            rows.append(row | choice(card, count, dtype, weights))
            few = {
                name: rows[-1].get(name) for name in ("verdict", "largest_batch", "longest_text")
            }
            print(place, weights, few, f"{time.monotonic() - begin:.0f} s", flush=True)
    names = ("torch", "transformers", "torchao", "bitsandbytes")
    report = {
        "provenance": "simulated",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name).partition("+")[0] for name in names},
        "workload": asdict(WORKLOAD),
        "rows": rows,
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
