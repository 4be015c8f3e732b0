"""How fast the miniature loads and answers on this machine: run it on an idle one.

    python benchmarks/miniature.py [--json]

Seconds of wall clock after import; the first question of a process, and the median of ten. The
limits are what the project promises on two cores. Where other programs keep these busy, PyTorch's
threads wait for each other, and a one-word answer can take more than a second.
"""

import argparse
import json
import statistics
import time

import torch

from glm4v_nb.inference import generate, load
from glm4v_nb.miniature import CHECKPOINT, sample_pictures
from simgpu import Rig

LIMITS = {"load_seconds": 2.0, "first_token_seconds": 0.5, "one_word_answer_seconds": 1.0}


def measure() -> dict:
    """Load, then ask a question with a one-word answer."""
    begin = time.perf_counter()
    model, processor = load(CHECKPOINT)
    figures = {"load_seconds": time.perf_counter() - begin}
    picture = sample_pictures()["One shape"]
    messages = [{"role": "user", "image": picture, "content": "What colour is the heart?"}]
    answers = [generate(model, processor, messages) for _ in range(10)]
    assert answers[0].text == "orange"
    figures["first_token_seconds"] = answers[0].first_token_seconds
    figures["one_word_answer_seconds"] = answers[0].seconds
    figures["median_first_token_seconds"] = statistics.median(
        answer.first_token_seconds for answer in answers
    )
    figures["median_one_word_answer_seconds"] = statistics.median(
        answer.seconds for answer in answers
    )
    figures = {name: round(value, 3) for name, value in figures.items()}
    return {
        **figures,
        "threads": torch.get_num_threads(),
        "provenance": Rig.here().provenance,
        "limits": LIMITS,
    }


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    figures = measure()
    if parser.parse_args().json:
        print(json.dumps(figures, indent=2))
        return
    for name, value in figures.items():
        limit = LIMITS.get(name)
        print(f"{name:32s}{value}" + (f"   (promised: {limit})" if limit else ""))


if __name__ == "__main__":
    main()
