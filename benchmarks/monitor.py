"""What a memory monitor costs a decode loop on this machine: run it on an idle one.

    python benchmarks/monitor.py [--json] [--tokens 200] [--pairs 15]

The miniature decodes with and without a monitor in turn, on this machine's GPU or its CPU.
``slowdown`` is the median over pairs of the ratio of the two times, less 1; ``sampling_share`` is
the time inside samples by the time of the monitored loops, an upper bound of what they can cost
where the sampler waits for the driver or for Python's lock. The miniature's steps are shorter than
the full-size model's, and so is the time Python leaves idle.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from glm4v_nb.inference import load
from glm4v_nb.miniature import CHECKPOINT
from glm4v_nb.workload import Workload, decode, make_prompt, prefill
from simgpu import Rig
from simgpu.monitor import Monitor, read_samples

LIMITS = {"slowdown": 0.01, "sampling_share": 0.01}


def decode_seconds(rig, model, tokens: int) -> float:
    """Wall clock of ``tokens`` greedy steps after a prefill, which is not counted."""
    prompt = make_prompt(model, Workload(images=1, text_tokens=16))
    with rig.stage("prefill"):
        outputs = prefill(model, prompt)
    with rig.stage("decode"):
        wait()
        begin = time.perf_counter()
        decode(rig, model, prompt, outputs, tokens)
        wait()
        return time.perf_counter() - begin


def wait():
    """Let the GPU finish."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(tokens: int, pairs: int, interval_seconds: float) -> dict:
    """Pairs of loops, the monitored one first in every other."""
    rig = Rig.here()
    with rig.stage("load"):
        model, _ = load(CHECKPOINT)
    decode_seconds(rig, model, tokens)  # the first loads kernels
    plain, monitored, samples, sampling, inside = [], [], 0, 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.jsonl"

        def with_monitor():
            nonlocal samples, sampling, inside
            with Monitor(rig, path, interval_seconds) as monitor:
                begin = time.perf_counter()
                monitored.append(decode_seconds(rig, model, tokens))
                inside += time.perf_counter() - begin
            samples, sampling = samples + monitor.samples, sampling + monitor.sampling_seconds

        for number in range(pairs):
            steps = [lambda: plain.append(decode_seconds(rig, model, tokens)), with_monitor]
            for step in steps if number % 2 else reversed(steps):
                step()
        last = read_samples(path)[-1]["cards"]
    ratios = [late / early - 1 for early, late in zip(plain, monitored, strict=True)]
    return {
        "slowdown": round(statistics.median(ratios), 5),
        "slowdown_quartiles": [round(each, 5) for each in statistics.quantiles(ratios, n=4)[::2]],
        "sampling_share": round(sampling / inside, 5),
        "microseconds_per_sample": round(1e6 * sampling / samples, 1),
        "samples": samples,
        "interval_seconds": interval_seconds,
        "plain_milliseconds_per_token": round(1e3 * statistics.median(plain) / (tokens - 1), 3),
        "monitored_milliseconds_per_token": round(
            1e3 * statistics.median(monitored) / (tokens - 1), 3
        ),
        "tokens": tokens,
        "pairs": pairs,
        "threads": torch.get_num_threads(),
        "last_sample": last,
        "provenance": rig.provenance,
        "limits": LIMITS,
    }


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--tokens", type=int, default=200, help="steps of a loop, at least 2")
    parser.add_argument("--pairs", type=int, default=15, help="loops of each kind, at least 2")
    parser.add_argument("--interval", type=float, default=0.1, help="seconds between samples")
    arguments = parser.parse_args()
    figures = measure(arguments.tokens, arguments.pairs, arguments.interval)
    if arguments.json:
        print(json.dumps(figures, indent=2))
        return
    for name, value in figures.items():
        limit = LIMITS.get(name)
        print(f"{name:34s}{value}" + (f"   (promised: below {limit})" if limit else ""))


if __name__ == "__main__":
    main()
