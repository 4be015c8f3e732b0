"""Quantised weights on a real GPU: peaks of load, prefill and decode, and tokens a second.

    python benchmarks/memory.py write DIR                      # random weights: 28 GB
    python benchmarks/quantising.py measure DIR --output FILE  # on the first GPU of this machine
    python benchmarks/quantising.py compare FILE               # the simulator beside it

Every format loads in a process of its own; the simulator runs the same cases with the same
functions. Until a file is stored, nothing here has been measured on a GPU.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from memory import ALLOCATED_BYTES, MIB, OFFICIAL, Run, prepare, provenance, recorded, workload_of

FORMATS = ("bfloat16", "int8", "int4", "nf4")
RUNS = (
    Run("image", text_tokens=98),
    Run("text 1700, 64 new", images=0, text_tokens=1700, new_tokens=64),
    Run("image, 64 new", text_tokens=98, new_tokens=64),
    Run("batch 4, 16 new", batch_size=4, text_tokens=100, new_tokens=16),
)
TIMED = RUNS[1]


def perform(weights: str, rig, checkpoint=OFFICIAL, runs=RUNS) -> list[dict]:
    """Load in a format and run on the first card of a rig; one record each, the load's first."""
    import torch

    from glm4v_nb.fit import load, run_workload
    from glm4v_nb.model.configuration import read_config
    from glm4v_nb.model.quantising import quantiser_for

    options, records, record = {}, [], {"run": "load"}
    if weights in FORMATS[1:]:
        quantiser = quantiser_for(weights, read_config(checkpoint), torch.bfloat16)
        options = {"quantization_config": quantiser}
    prepare(rig, None)
    with recorded(rig, record, records):
        model = load(rig, {"": 0}, torch.bfloat16, checkpoint, **options)
    if record["out_of_memory"]:
        return records
    for run in runs:
        prepare(rig, None)
        record = {"run": run.name}
        with recorded(rig, record, records):
            run_workload(rig, model, workload_of(run))
        if run == TIMED and not rig.provenance.startswith("simulated"):
            record["tokens_per_second"] = tokens_per_second(rig, model, run)
    return records


def tokens_per_second(rig, model, run: Run) -> float:
    """Of the decode steps alone, transformers' own loop, after a run that has warmed up."""
    import torch

    from glm4v_nb.workload import decode, make_prompt, prefill

    prompt = make_prompt(model, workload_of(run))
    outputs = prefill(model, prompt)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    decode(rig, model, prompt, outputs, run.new_tokens)
    torch.cuda.synchronize()
    return (run.new_tokens - 1) / (time.perf_counter() - begin)


def figures(records: list[dict]) -> dict[tuple, int]:
    """Peaks of allocated memory on the first card by run and stage."""
    return {
        (record["run"], stage["name"]): stage["memory"][0]["peak_allocated_bytes"]
        for record in records
        for stage in record["stages"]
    }


def compare(weights: str, measured: list[dict], simulated: list[dict]) -> list[str]:
    """What differs by more than is promised, in words."""
    real, ours = figures(measured), figures(simulated)
    wrong = [
        f"{weights}, {run}, {stage}: {ours[run, stage] / MIB:.1f} MiB simulated,"
        f" {real[run, stage] / MIB:.1f} measured"
        for run, stage in real.keys() & ours.keys()
        if abs(ours[run, stage] - real[run, stage]) > ALLOCATED_BYTES
    ]
    wrong += [
        f"{weights}, {run}, {stage}: in one alone" for run, stage in real.keys() ^ ours.keys()
    ]
    return sorted(wrong)


def measure(given: argparse.Namespace):
    """Every format in a process of its own; results are written after each."""
    from importlib.metadata import version

    names = ("torchao", "bitsandbytes")
    results = {"provenance": provenance() | {name: version(name) for name in names}, "formats": {}}
    for weights in given.formats:
        print(weights, flush=True)
        part = given.output.with_suffix(f".{weights}.part")
        command = [sys.executable, __file__, "one", given.checkpoint, "--formats", weights]
        subprocess.run([*command, "--output", str(part)], check=False)
        if not part.exists():
            print(f"error: {weights} ended without a result", file=sys.stderr)
            continue
        results["formats"][weights] = json.loads(part.read_text(encoding="utf-8"))
        part.unlink()
        given.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def main():
    """Measure on this machine's GPU, or simulate a stored file's cases and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=("measure", "one", "compare"))
    parser.add_argument("checkpoint", help="a folder; of compare, a file of measure")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--formats", nargs="*", default=FORMATS, choices=FORMATS)
    given = parser.parse_args()
    from simgpu import Rig

    if given.task != "compare" and given.output is None:
        parser.error("--output FILE is missing")
    if given.task == "measure":
        measure(given)
    elif given.task == "one":
        records = perform(given.formats[0], Rig.here(), given.checkpoint)
        given.output.write_text(json.dumps(records), encoding="utf-8")
    else:
        stored = json.loads(Path(given.checkpoint).read_text(encoding="utf-8"))
        (card, *_) = stored["provenance"]["cards"]
        wrong = []
        for weights, measured in stored["formats"].items():
            wrong += compare(weights, measured, perform(weights, Rig.simulated(card)))
        print("\n".join(wrong) or f"every peak within {ALLOCATED_BYTES // MIB} MiB")
        sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
