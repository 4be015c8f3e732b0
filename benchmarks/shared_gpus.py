"""Whether the monitor and `doctor` see other processes on this machine's GPUs, in a minute.

    python benchmarks/shared_gpus.py > FILE

Another process takes some memory of every GPU, and lets it go at its end. Meanwhile the miniature
is loaded and answers, watched by a monitor; then the samples from before, during and after are
compared with what was taken.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from glm4v_nb.doctor import examine
from glm4v_nb.inference import load
from glm4v_nb.miniature import CHECKPOINT
from glm4v_nb.workload import Workload, decode, make_prompt, prefill
from simgpu import Rig
from simgpu.monitor import Monitor, read_samples

MIB = 2**20
OTHER = """
import sys, torch
size, cards = int(sys.argv[1]), range(torch.cuda.device_count())
taken = [torch.empty(size, dtype=torch.uint8, device=index) for index in cards]
torch.cuda.synchronize()
print([torch.cuda.memory_reserved(index) for index in cards], flush=True)
sys.stdin.readline()
"""


def measure(taken_bytes: int) -> dict:
    """Samples of each stage, and what `doctor` says of the GPUs' users while they are shared."""
    rig = Rig.here()
    with rig.stage("load"):
        model, _ = load(CHECKPOINT)
    # A context on every card: without one NVML does not list this process.
    for index in range(torch.cuda.device_count()):
        torch.ones(1, device=index)
    prompt = make_prompt(model, Workload(images=1, text_tokens=16))

    def answer(name: str):
        with rig.stage(name):
            decode(rig, model, prompt, prefill(model, prompt), 200)
            torch.cuda.synchronize()

    answer("first")  # loads kernels
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.jsonl"
        with Monitor(rig, path, interval_seconds=0.05):
            answer("alone")
            other = subprocess.Popen(
                [sys.executable, "-c", OTHER, str(taken_bytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            try:
                reserved = json.loads(other.stdout.readline() or "null")
                if reserved is None:
                    sys.exit("error: the other process ended; see what it wrote above")
                answer("shared")
                users = [
                    finding.found
                    for finding in examine()
                    if finding.subject.startswith("users of GPU")
                ]
            finally:
                other.communicate("\n")
            answer("alone again")
        samples = read_samples(path)
    others = {
        stage: [
            [
                sample["cards"][index]["others_bytes"]
                for sample in samples
                if stage in sample["stages"]
            ]
            for index in range(len(reserved))
        ]
        for stage in ("alone", "shared", "alone again")
    }
    return {
        "provenance": rig.provenance,
        "taken_bytes": taken_bytes,
        "reserved_by_other_bytes": reserved,
        "samples": {stage: len(cards[0]) for stage, cards in others.items()},
        "others_bytes": {
            stage: [sorted(set(card)) for card in cards] for stage, cards in others.items()
        },
        "doctor": users,
    }


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--mib", type=int, default=3000, help="what the other process takes of every GPU"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no GPU here; this measures how real ones are shared")
    print(json.dumps(measure(arguments.mib * MIB), indent=1))


if __name__ == "__main__":
    main()
