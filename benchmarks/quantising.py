"""Quantised weights on a real GPU: peaks of load, prefill, decode, training; tokens a second.

    python benchmarks/memory.py write DIR                      # random weights: 28 GB
    python benchmarks/quantising.py measure DIR --output FILE  # on the first GPU of this machine
    python benchmarks/quantising.py merge FILE --output OTHER  # into what is stored
    python benchmarks/memory.py compare FILE                   # the simulator beside it

Every load is a process of its own; some run at once, as many as fit on the card together, for what
one process takes does not depend on the others. Tokens a second are counted while nothing else
runs.
"""

import argparse
import fcntl
import json
import logging
import re
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from memory import GB, Load, Run, perform, provenance, traced

FORMATS = ("bfloat16", "int8", "int4", "nf4")
LIBRARIES = ("torchao", "bitsandbytes", "peft")
CAPS = (None, 24 * GB, 16 * GB, 12 * GB)
TIMED = Run("text 1700, 32 new", images=0, text_tokens=1700, new_tokens=32)
# With and without an image; of few and many rows, for which bitsandbytes has ways of its own.
RUNS = (
    Run("image", text_tokens=98),
    TIMED,
    Run("image, 32 new", text_tokens=98, new_tokens=32),
    Run("batch 4, 16 new", batch_size=4, text_tokens=100, new_tokens=16),
    Run("text 24, 8 new", images=0, text_tokens=24, new_tokens=8),
    Run("batch 8, text 40, 8 new", batch_size=8, images=0, text_tokens=40, new_tokens=8),
)
# Under a cap: what some of the formats have no room for, too.
CAPPED = (
    Run("image, 16 new", text_tokens=98, new_tokens=16),
    Run("batch 4, 4 new", batch_size=4, text_tokens=100, new_tokens=4),
    Run("batch 12", batch_size=12, text_tokens=100),
    Run("text 4000, 4 new", images=0, text_tokens=4000, new_tokens=4),
)
SHORT = (
    Run("image, 8 new", text_tokens=98, new_tokens=8),
    Run("text 24, 4 new", images=0, text_tokens=24, new_tokens=4),
    Run("batch 2, text 300, 4 new", batch_size=2, images=0, text_tokens=300, new_tokens=4),
)
STEPS = tuple(
    Run(
        name,
        images=images,
        text_tokens=text,
        batch_size=batch,
        train="lora",
        gradient_checkpointing=True,
        optimizer="AdamW",
    )
    for name, images, text, batch in (
        ("step, text 256", 0, 256, 1),
        ("step, image, batch 2", 1, 32, 2),
    )
)
# Each matrix of LLM.int8 goes by way of the host while it is loaded, a tenth of a second: of
# decoder and tower the first eight layers are quantised.
REST = (
    "lm_head",
    *(f"language_model.layers.{number}" for number in range(8, 40)),
    *(f"vision_tower.layers.{number}" for number in range(8, 63)),
)


def named(weights: str, runs: tuple[Run, ...], what: str = "", **others) -> Load:
    """One process, called by its format and what is special about it."""
    quantised = weights if weights != "bfloat16" else ""
    options = {"device_map": {"": 0}, "runs": runs} | others
    return Load(f"{weights}{what}", weights=quantised, **options)


def capped(weights: str, *caps: int) -> Load:
    """Loaded under the first cap, in bytes; runs follow under each."""
    runs = tuple(
        replace(run, name=f"{run.name}, cap {cap // GB} GB", cap_bytes=cap)
        for cap in caps
        for run in CAPPED
    )
    return named(weights, runs, f", capped to {caps[0] // GB} GB", cap_bytes=caps[0])


PLAN = (
    # Those that are timed first, which are the largest.
    *(named(weights, RUNS) for weights in FORMATS),
    named("nf4", STEPS, ", QLoRA"),
    capped("int8", 16 * GB, 24 * GB),
    capped("nf4", 12 * GB, 16 * GB, 24 * GB),
    *(capped("int4", cap) for cap in CAPS[1:]),  # whose prompts are slow
    named("LLM.int8", SHORT, ", eight layers", keep=REST),
    *(capped("bfloat16", cap) for cap in CAPS[1:]),
    capped("int8", 12 * GB),
    named("nf4", SHORT, ", half precision", dtype="float16"),
    named("int8", STEPS[:1], ", LoRA"),
    named("nf4", SHORT, ", tower kept", keep=("lm_head", "vision_tower")),
    named("int4", SHORT, ", head too", keep=()),
)
# GB of the card that a process takes at most, its context included: by them is chosen what runs at
# once.
_ROOM = {"bfloat16": 32, "int8": 19, "int4": 14, "nf4": 14, "LLM.int8": 28}


def tokens_per_second(rig, model, run: Run) -> float:
    """Of the decode steps alone, transformers' own loop, after a run that has warmed up."""
    import torch

    from glm4v_nb.workload import Workload, decode, make_prompt, prefill

    prompt = make_prompt(model, Workload(run.batch_size, run.images, run.text_tokens))
    outputs = prefill(model, prompt)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    decode(rig, model, prompt, outputs, run.new_tokens)
    torch.cuda.synchronize()
    return (run.new_tokens - 1) / (time.perf_counter() - begin)


@contextmanager
def locked(path: Path, alone: bool):
    """Work beside others, or wait until they have ended theirs and keep them from starting more."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def measure_one(given: argparse.Namespace):
    """One load of the plan, in this process; writes one JSON file."""
    from simgpu import Rig
    from simgpu.oom import parse_out_of_memory

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at every product
    load, lock = PLAN[given.number], given.output.with_name("quantising.lock")
    timed, begin = [], time.perf_counter()

    def after(rig, model, run, record):
        if run == load.runs[-1] and load.runs == RUNS:
            timed.append((rig, model))

    def around(run: str):
        if f"{load.name}: {run}" not in given.traced:
            return nullcontext()
        name = re.sub(r"[^a-zA-Z0-9]+", "_", f"{load.name}_{run}")
        return traced(str(given.output.with_name(f"trace_{name}.json.gz")), True)

    with locked(lock, alone=False):
        records = perform(load, Rig.here(), given.checkpoint, around=around, after=after)
        for record in filter(lambda each: each["out_of_memory"], records):
            # Of the moment when it ran out, as others come and go.
            said = parse_out_of_memory(record["out_of_memory"])
            record["others_bytes"] = [said.capacity_bytes - said.free_bytes - said.process_bytes]
        result = {
            "load": asdict(load),
            "seconds": round(time.perf_counter() - begin, 1),
            "records": records,
        }
        result["provenance"] = (
            provenance() | {"weights": "random"} | {name: version(name) for name in LIBRARIES}
        )
        given.output.write_text(json.dumps(result), encoding="utf-8")
    for rig, model in timed:
        with locked(lock, alone=True):
            result["tokens_per_second"] = tokens_per_second(rig, model, TIMED)
        print(f"  {load.name}: {result['tokens_per_second']:.1f} tokens/s", flush=True)
    given.output.write_text(json.dumps(result), encoding="utf-8")


def room(load: Load) -> int:
    """GB of the card that are kept for a load."""
    caps = [run.cap_bytes for run in load.runs if run.cap_bytes]
    return max(caps) // GB + 1 if caps else _ROOM[load.weights or "bfloat16"]


def measure(given: argparse.Namespace):
    """Every load of the plan in a process of its own; results are written after each."""
    results = {"provenance": {}, "loads": []}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    waiting = [
        number
        for number, load in enumerate(PLAN)
        if not given.only or any(re.search(each, load.name) for each in given.only)
    ]
    running: dict[int, tuple[subprocess.Popen, Path]] = {}
    found: dict[int, dict] = {}
    begin = time.perf_counter()
    while waiting or running:
        since = time.perf_counter() - begin
        for number in [] if since > given.seconds else list(waiting):
            in_use = sum(room(PLAN[each]) for each in (*running, number))
            if len(running) == given.at_once or in_use > given.card:
                continue
            part = given.output.with_suffix(f".{number}.part")
            command = [sys.executable, __file__, "one", given.checkpoint, "--number", str(number)]
            command += ["--output", str(part), "--traced", *given.traced]
            running[number] = subprocess.Popen(command), part
            waiting.remove(number)
        time.sleep(0.2)
        for number, (process, part) in list(running.items()):
            if process.poll() is None and since < given.seconds:
                continue
            process.kill()
            code = process.wait()
            del running[number]
            print(f"{since:.0f} s: {PLAN[number].name}, code {code}", flush=True)
            if part.exists():
                found[number] = json.loads(part.read_text(encoding="utf-8"))
                results["provenance"] = found[number].pop("provenance")
                part.unlink()
            results["loads"] = [found[each] for each in sorted(found)]
            given.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        if since > given.seconds:
            print("not run:", *(PLAN[each].name for each in waiting), sep="\n  ")
            return


def merge(new: Path, into: Path):
    """Put the loads of one file into another, in place of those of the same names.

    Raises:
        ValueError: they are of other cards, drivers or versions.
    """
    results = json.loads(new.read_text(encoding="utf-8"))
    if into.exists():
        stored = json.loads(into.read_text(encoding="utf-8"))
        others = [
            name
            for name, value in stored["provenance"].items()
            if name != "date" and results["provenance"].get(name) != value
        ]
        if others:
            raise ValueError(f"{new} and {into} differ in {', '.join(others)}. Give another file.")
        loads = {each["load"]["name"]: each for each in (*stored["loads"], *results["loads"])}
        results = stored | {"loads": [*loads.values()]}
    into.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def main():
    """Measure on this machine's GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=("measure", "one", "merge"))
    parser.add_argument("checkpoint", help="a folder; of merge, a file of measure")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[], help="loads whose name has one of these")
    parser.add_argument("--number", type=int)
    parser.add_argument("--seconds", type=float, default=3600, help="what then runs is ended")
    parser.add_argument("--card", type=int, default=82, help="GB of it to be used at once")
    parser.add_argument("--at-once", type=int, default=6, help="as many processes at most")
    parser.add_argument(
        "--traced",
        nargs="*",
        default=[],
        help='write every allocation of these, too, as in "nf4: load"',
    )
    given = parser.parse_args()
    if given.task == "merge":
        merge(Path(given.checkpoint), given.output)
    else:
        (measure if given.task == "measure" else measure_one)(given)


if __name__ == "__main__":
    main()
