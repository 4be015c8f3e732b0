"""Peak memory of the full-size model, on real GPUs and simulated: one program, two worlds.

    python benchmarks/memory.py write DIR                  # random weights, official layout: 28 GB
    python benchmarks/memory.py measure DIR --output FILE  # on this machine's GPUs
    python benchmarks/memory.py compare FILE...            # the simulator beside stored figures

Every load is measured in a process of its own, and the simulator runs the same cases.
A *load* is one process: the model is loaded once, then its *runs* follow, each from an emptied
cache. A cap is set with ``set_per_process_memory_fraction``; runs at the edge of a cap take theirs
from the peak of an earlier run.
"""

import argparse
import gc
import gzip
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

MIB, GIB, GB = 2**20, 2**30, 10**9
CAP = 24 * GB
OFFICIAL = "zai-org/glm-4v-9b"


@dataclass(frozen=True)
class Run:
    """One workload. ``cap_bytes`` holds for every card; ``edge`` is (earlier run, MiB above its
    reserved peak)."""

    name: str
    batch_size: int = 1
    images: int = 1
    text_tokens: int = 32
    new_tokens: int = 1
    train: str = ""  # what is trained: "everything", "decoder" or "lora"
    gradient_checkpointing: bool = False
    optimizer: str = ""  # "AdamW" or "AdamW, one by one" (foreach=False)
    cap_bytes: int | None = None
    edge: tuple[str, int] | None = None


@dataclass(frozen=True)
class Load:
    """One process: how the model is loaded, and what runs follow."""

    name: str
    cards: int = 1
    dtype: str = "bfloat16"
    attention: str = "sdpa"
    device_map: str | dict = "auto"
    max_memory_gib: tuple[int, ...] | None = None
    cap_bytes: int | None = None
    runs: tuple[Run, ...] = field(default_factory=tuple)
    weights: str = ""  # quantised while loading: "int8", "int4", "nf4" or "LLM.int8"
    keep: tuple[str, ...] = ("lm_head",)  # but for these modules


def edges(of: str, *offsets_mib: int, **workload) -> tuple[Run, ...]:
    """Runs of one workload under caps a little above and below its own reserved peak."""
    return tuple(
        Run(f"{of}, cap {offset:+d} MiB", edge=(of, offset), **workload) for offset in offsets_mib
    )


TOWER_ON_CPU = {"vision_tower": "cpu", "language_model": 0, "lm_head": 0}
ONE_BF16 = Load(
    "one card, bfloat16, sdpa",
    runs=(
        Run("image"),
        Run("text 32", images=0),
        Run("text 1700, 4 new", images=0, text_tokens=1700, new_tokens=4),
        Run("batch 2", batch_size=2, text_tokens=512),
        Run("image, text 6000", text_tokens=6000),
        Run("image, 64 new", new_tokens=64),
        Run("text 6000, 64 new", images=0, text_tokens=6000, new_tokens=64),
        Run("batch 4, 64 new", batch_size=4, text_tokens=100, new_tokens=64),
        Run("batch 4, text 6000", batch_size=4, images=0, text_tokens=6000),
        *edges("image", -24, 64),
        *edges("image, text 6000", -300, -24, 64, text_tokens=6000),
        *edges("batch 4, 64 new", -500, -24, 64, batch_size=4, text_tokens=100, new_tokens=64),
        *edges("text 6000, 64 new", -24, 64, images=0, text_tokens=6000, new_tokens=64),
    ),
)
ONE_EAGER = Load(
    "one card, bfloat16, eager",
    attention="eager",
    runs=(
        Run("image"),
        Run("text 1700, 8 new", images=0, text_tokens=1700, new_tokens=8),
        *edges("image", -200, 64),
    ),
)
ONE_FP32 = Load(
    "one card, float32, sdpa",
    dtype="float32",
    runs=(
        Run("image"),
        Run("text 1700, 8 new", images=0, text_tokens=1700, new_tokens=8),
        Run("batch 2", batch_size=2, text_tokens=512),
        *edges("batch 2", -100, 64, batch_size=2, text_tokens=512),
    ),
)
ONE_CAPPED = Load("one card capped to 24 GB", cap_bytes=CAP, runs=(Run("image", cap_bytes=CAP),))
ONE_OFFLOAD = Load(
    "one card capped to 24 GB, tower on the CPU",
    device_map=TOWER_ON_CPU,
    cap_bytes=CAP,
    runs=(
        Run("image", cap_bytes=CAP),
        Run("text 1700, 8 new", images=0, text_tokens=1700, new_tokens=8, cap_bytes=CAP),
        Run("batch 4", batch_size=4, cap_bytes=CAP),
    ),
)
ONE_TRAIN = tuple(
    Load(
        f"one card, training, {train}{', checkpointing' if checkpointing else ''}",
        runs=(
            Run(
                "text 256, AdamW",
                images=0,
                text_tokens=256,
                train=train,
                gradient_checkpointing=checkpointing,
                optimizer="AdamW" if train == "lora" else "",
            ),
            Run("batch 2", batch_size=2, train=train, gradient_checkpointing=checkpointing),
        ),
    )
    for train, checkpointing in (("decoder", False), ("decoder", True), ("lora", True))
)
TWO_AUTO = Load(
    "two cards, auto",
    cards=2,
    runs=(
        Run("image"),
        Run("image, 64 new", new_tokens=64),
        Run("image, text 6000", text_tokens=6000),
        Run("batch 4, 64 new", batch_size=4, text_tokens=100, new_tokens=64),
        *edges("image", -24, 64),
        *edges("batch 4, 64 new", -500, -24, 64, batch_size=4, text_tokens=100, new_tokens=64),
        # Last: on two H100 with torch 2.11 this one ended in a launch failure, which takes the
        # process with it.
        Run("batch 4, text 6000", batch_size=4, images=0, text_tokens=6000),
    ),
)
TWO_CAPPED = Load(
    "two cards capped to 24 GB, auto",
    cards=2,
    cap_bytes=CAP,
    runs=(
        Run("image, 64 new", new_tokens=64, cap_bytes=CAP),
        Run("batch 4, text 1000", batch_size=4, text_tokens=1000, cap_bytes=CAP),
        Run("batch 20", batch_size=20, cap_bytes=CAP),
        Run("batch 24", batch_size=24, cap_bytes=CAP),
    ),
)
TWO_SEQUENTIAL = Load(
    "two cards capped to 24 GB, sequential",
    cards=2,
    device_map="sequential",
    max_memory_gib=(21, 21),
    cap_bytes=CAP,
    runs=(
        Run("image", cap_bytes=CAP),
        Run("batch 2, 8 new", batch_size=2, text_tokens=512, new_tokens=8, cap_bytes=CAP),
        Run("batch 4", batch_size=4, cap_bytes=CAP),
    ),
)
TWO_EXPLICIT = Load(
    "two cards, tower on card 1",
    cards=2,
    device_map={"vision_tower": 1, "language_model": 0, "lm_head": 1},
    cap_bytes=CAP,
    runs=(
        Run("image, 8 new", new_tokens=8, cap_bytes=CAP),
        Run("batch 2, text 2000", batch_size=2, text_tokens=2000, cap_bytes=CAP),
    ),
)
TWO_TRAIN = Load(
    "two cards, training, everything, checkpointing",
    cards=2,
    runs=(
        Run(
            "image, AdamW one by one",
            train="everything",
            gradient_checkpointing=True,
            optimizer="AdamW, one by one",
        ),
    ),
)
SMALL = 10 * GB
FOUR_AUTO = Load(
    "four cards, auto",
    cards=4,
    runs=(
        Run("image"),
        Run("image, 64 new", new_tokens=64),
        Run("image, text 6000", text_tokens=6000),
        Run("batch 4, text 1000, 8 new", batch_size=4, text_tokens=1000, new_tokens=8),
        *edges("image", -24, 64),
    ),
)
FOUR_LOW = Load(
    "four cards, balanced_low_0",
    cards=4,
    device_map="balanced_low_0",
    runs=(
        Run("image, 8 new", new_tokens=8),
        Run("batch 3, text 2000", batch_size=3, images=0, text_tokens=2000),
    ),
)
FOUR_CAPPED = Load(
    "four cards capped to 10 GB, auto",
    cards=4,
    cap_bytes=SMALL,
    runs=(
        Run("image, 8 new", new_tokens=8, cap_bytes=SMALL),
        Run("batch 2, text 1500", batch_size=2, text_tokens=1500, cap_bytes=SMALL),
        Run("batch 6", batch_size=6, cap_bytes=SMALL),
        Run("batch 12", batch_size=12, cap_bytes=SMALL),
    ),
)
FOUR_TRAIN = tuple(
    Load(
        f"four cards, training, {train}, checkpointing",
        cards=4,
        runs=(
            Run(
                "batch 2, AdamW",
                batch_size=2,
                train=train,
                gradient_checkpointing=True,
                optimizer="AdamW",
            ),
        ),
    )
    for train in ("everything", "lora")
)
PLANS = {
    1: (ONE_BF16, ONE_OFFLOAD, ONE_CAPPED, ONE_EAGER, *ONE_TRAIN[::-1], ONE_FP32),
    2: (TWO_AUTO, TWO_CAPPED, TWO_SEQUENTIAL, TWO_EXPLICIT, TWO_TRAIN),
    4: (FOUR_AUTO, FOUR_LOW, FOUR_CAPPED, *FOUR_TRAIN),
}


def write_checkpoint(directory: str):
    """Random bfloat16 weights in the official layout."""
    import random_checkpoint

    from glm4v_nb.model import official_config

    random_checkpoint.write(directory, official_config())


def perform(
    load: Load,
    rig,
    checkpoint: str,
    caps: dict[str, int] | None = None,
    around=nullcontext,
    goes_on=lambda record: True,
    after=lambda rig, model, run, record: None,
) -> list[dict]:
    """Load and run on a rig, real or simulated, with the functions of ``fit``; one record per run,
    the load's own first.

    ``caps``: of runs at an edge, by name, when known from a measurement; otherwise taken from the
    run they name. ``around``: a context for each, given the name of the run. ``goes_on``: given the
    load's record, whether its runs follow. ``after``: called once a run has ended without an error.
    """
    from glm4v_nb.fit import DTYPES, run_workload
    from glm4v_nb.fit import load as load_model

    records: list[dict] = []
    caps = dict(caps or {})
    prepare(rig, load.cap_bytes)
    record = {"run": "load", "cap_bytes": load.cap_bytes}
    with around("load"), recorded(rig, record, records):
        model = load_model(
            rig,
            load.device_map,
            DTYPES[load.dtype],
            checkpoint,
            attn_implementation=load.attention,
            max_memory=max_memory(load),
            **quantiser(load, checkpoint),
        )
    if record["out_of_memory"] or not goes_on(record):
        return records
    for run in load.runs:
        cap = run.cap_bytes
        if run.edge:
            cap = caps.get(run.name) or edge_cap(records, run)
        prepare(rig, cap)
        record = {**asdict(run), "run": run.name, "cap_bytes": cap}
        with around(run.name), recorded(rig, record, records):
            run_workload(rig, model, workload_of(run), foreach="one by one" not in run.optimizer)
        if run.train:
            if len(record["stages"]) > 1:  # the first made the inputs, the backward pass has them
                del record["stages"][0]
            model.zero_grad()
        if not record["out_of_memory"]:
            after(rig, model, run, record)
    return records


def quantiser(load: Load, checkpoint: str) -> dict:
    """What ``from_pretrained`` is told besides for weights that are quantised while loading."""
    from glm4v_nb.fit import DTYPES
    from glm4v_nb.model.configuration import read_config
    from glm4v_nb.model.quantising import quantiser_for

    if not load.weights:
        return {}
    if load.weights == "LLM.int8":
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(load.keep))
    else:
        model = read_config(checkpoint)
        config = quantiser_for(load.weights, model, DTYPES[load.dtype], load.keep)
    return {"quantization_config": config}


def max_memory(load: Load) -> dict[int, str] | None:
    """What ``from_pretrained`` may put on each card."""
    return load.max_memory_gib and {
        index: f"{size}GiB" for index, size in enumerate(load.max_memory_gib)
    }


def workload_of(run: Run):
    """The run in the terms of ``fit``."""
    from glm4v_nb.workload import Workload

    sizes = (run.batch_size, run.images, run.text_tokens, run.new_tokens)
    if not run.train:
        return Workload(*sizes)
    return Workload(
        *sizes,
        train=True,
        gradient_checkpointing=run.gradient_checkpointing,
        trained=run.train,
        optimizer="adamw" if run.optimizer else "",
    )


@contextmanager
def recorded(rig, record: dict, records: list[dict]):
    """Keeps the stages of one run, and an out-of-memory error if it ends by one."""
    import torch

    before = len(rig.stages)
    record["out_of_memory"] = None
    try:
        yield
    except torch.OutOfMemoryError as error:
        record["out_of_memory"] = str(error)
        record["others_bytes"] = others_bytes(rig)
    record["stages"] = [
        {"name": stage.name, "memory": [card_figures(memory) for memory in stage.memory]}
        for stage in rig.stages[before:]
    ]
    records.append(record)
    failed = f"  {record['out_of_memory'][:60]}" if record["out_of_memory"] else ""
    print(f"  {record['run']}{failed}", flush=True)


def card_figures(memory) -> dict[str, int]:
    """What is compared of one card, and what the driver counts outside PyTorch's allocator, others
    included."""
    return {
        "allocated_bytes": memory.allocated_bytes,
        "reserved_bytes": memory.reserved_bytes,
        "peak_allocated_bytes": memory.peak_allocated_bytes,
        "peak_reserved_bytes": memory.peak_reserved_bytes,
        "outside_bytes": memory.capacity_bytes - memory.free_bytes - memory.reserved_bytes,
    }


def others_bytes(rig) -> list[int]:
    """What other processes use of each card, by NVML; nothing on simulated cards."""
    if rig.provenance.startswith("simulated"):
        return [0 for _ in rig.memory()]
    import torch

    from simgpu.nvml import handle_of, nvml, processes_on

    with nvml():
        cards = map(torch.cuda.get_device_properties, range(len(rig.memory())))
        return [
            sum(size or 0 for pid, size in processes_on(handle) or () if pid != os.getpid())
            for handle in (handle_of(card.uuid) for card in cards)
        ]


def edge_cap(records: list[dict], run: Run) -> int:
    """The reserved peak of the run it names, on the card where it is highest, plus its distance."""
    name, offset = run.edge
    stages = next(record for record in records if record["run"] == name)["stages"]
    return (
        max(card["peak_reserved_bytes"] for stage in stages for card in stage["memory"])
        + offset * MIB
    )


def prepare(rig, cap_bytes: int | None):
    """Empty the cache, as between two experiments in a notebook, and cap this process on every
    card.

    Without a cap the one before is taken away; the message then still says what is allowed.
    """
    import torch

    gc.collect()
    with rig:
        torch.cuda.empty_cache()
        for index, memory in enumerate(rig.memory()):
            fraction = cap_bytes / memory.capacity_bytes if cap_bytes else 1.0
            torch.cuda.set_per_process_memory_fraction(fraction, index)


def plan(cards: int, only: str = "") -> list[Load]:
    """The loads for this number of cards, or those whose name contains a text."""
    return [load for load in PLANS[cards] if only in load.name]


def measure_one(arguments: argparse.Namespace):
    """One load of the plan, in this process; prints nothing but progress and writes one JSON
    file."""
    import torch

    from simgpu import Rig

    load = plan(torch.cuda.device_count())[arguments.number]
    started = time.perf_counter()

    def around(run: str):
        if arguments.trace and any(text in run for text in arguments.traced_runs):
            name = re.sub(r"[^a-z0-9]+", "_", run)
            return traced(
                f"{arguments.trace}.{arguments.number}.{name}.json.gz", arguments.trace_lines
            )
        return nullcontext()

    records = perform(load, Rig.here(), arguments.checkpoint, around=around)
    result = {"load": asdict(load), "seconds": time.perf_counter() - started, "records": records}
    Path(arguments.output).write_text(json.dumps(result), encoding="utf-8")


@contextmanager
def traced(path: str, with_lines: bool):
    """Write every allocation and release inside, with the innermost lines of Python behind it, to
    find causes.

    ``with_lines``: torch 2.11 fails to look for them in a backward pass over two GPUs with gradient
    checkpointing. ``before`` and ``after`` are the segments: [card, address, pool, [[bytes, state]
    of each block]].
    """
    import torch

    def segments():
        return [
            [
                segment["device"],
                segment["address"],
                segment["segment_type"],
                [[block["size"], block["state"]] for block in segment["blocks"]],
            ]
            for segment in torch.cuda.memory._snapshot()["segments"]
        ]

    before = segments()
    torch.cuda.memory._record_memory_history(
        context="all" if with_lines else None, max_entries=2_000_000, stacks="python"
    )
    try:
        yield
    finally:
        traces = torch.cuda.memory._snapshot()["device_traces"]
        torch.cuda.memory._record_memory_history(enabled=None)
    lines: dict[str, int] = {}
    events = []
    for card, trace in enumerate(traces):
        for event in trace:
            if event["action"] == "free_requested":  # "free_completed" follows
                continue
            frames = [
                f"{'/'.join(frame['filename'].split('/')[-2:])}:{frame['line']}"
                for frame in event.get("frames", ())[:12]
            ]
            place = lines.setdefault(" < ".join(frames), len(lines))
            events.append(
                [card, event["action"], event.get("addr", 0), event.get("size", 0), place]
            )
    with gzip.open(path, "wt", encoding="utf-8") as file:
        content = {"before": before, "lines": list(lines), "events": events, "after": segments()}
        json.dump(content, file)


def provenance() -> dict:
    """Card, driver, versions, date."""
    import accelerate
    import torch
    import transformers

    from simgpu.nvml import driver_version

    cards = Counter(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return {
        "cards": dict(cards),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "cap": "set_per_process_memory_fraction, where a case has cap_bytes",
    }


def measure(arguments: argparse.Namespace):
    """Every load of the plan in a process of its own; results are written after each."""
    import torch

    output = Path(arguments.output)
    results = {"provenance": provenance(), "loads": []}
    for number, load in enumerate(plan(torch.cuda.device_count())):
        if arguments.only not in load.name:
            continue
        print(load.name, flush=True)
        part = output.with_suffix(f".{number}.part")
        command = [sys.executable, __file__, "one", arguments.checkpoint, "--number", str(number)]
        if arguments.trace and any(text in load.name for text in arguments.traced):
            command += ["--trace", arguments.trace, "--traced-runs", *arguments.traced_runs]
            command += ["--trace-lines" if arguments.trace_lines else "--no-trace-lines"]
        subprocess.run([*command, "--output", str(part)], check=False)
        if not part.exists():
            print(f"error: {load.name} ended without a result", file=sys.stderr)
            continue
        results["loads"].append(json.loads(part.read_text(encoding="utf-8")))
        part.unlink()
        output.write_text(json.dumps(results, indent=1), encoding="utf-8")


@dataclass(frozen=True)
class Figure:
    """One figure measured and simulated, in bytes; ``allowed_bytes`` is how far apart they may
    be."""

    load: str
    run: str
    stage: str
    card: int
    name: str
    measured: int
    simulated: int
    allowed_bytes: float

    @property
    def right(self) -> bool:
        return abs(self.simulated - self.measured) <= self.allowed_bytes


# What the simulator promises. A message rounds to two decimals, and another process or driver takes
# some MiB.
ALLOCATED_BYTES, RESERVED_SHARE, MESSAGE_BYTES = 4 * MIB, 0.01, 16 * MIB
# One card of one run is allowed more: its requests were traced and are those of the GPU, in the
# same order, but which of several equal holes is filled hangs on addresses that the driver gives,
# also to its own kernels.
_FURTHER = {("four cards, training, everything, checkpointing", 1): (5 * MIB, 0.025)}


def simulate(results: dict) -> list[tuple[Load, list[dict], list[dict]]]:
    """The loads of a file of measurements, with the measured and the simulated records of each.

    Of the two orders in which a real loader puts the last weights on a card (``head_first``) a load
    is simulated in the one its own reserved bytes show; the figures of all its runs then have to
    fit that order.
    """
    from simgpu import Rig

    found = []
    (card,) = results["provenance"]["cards"]
    for measured in results["loads"]:
        load = read_load(measured["load"])
        caps = {record["run"]: record["cap_bytes"] for record in measured["records"]}

        def simulated(goes_on, load=load, caps=caps):
            # bitsandbytes' 8 bits ask every input whether a number in it is large.
            assume = "count" if load.weights == "LLM.int8" else "refuse"
            rig = Rig.simulated(card, load.cards, "", assume=assume)
            return perform(load, rig, OFFICIAL, caps, goes_on=goes_on)

        def as_measured(record, load=load, real=measured["records"][0]):
            return load.cards == 1 or same_reserved(real, record)

        records = simulated(as_measured)
        if not as_measured(records[0]):
            with head_first():
                records = simulated(as_measured)
            if as_measured(records[0]):
                print("  the head was loaded before the last layer", flush=True)
            else:  # in neither order
                records = simulated(lambda record: True)
        found.append((load, measured["records"], records))
    return found


def same_reserved(measured: dict, simulated: dict) -> bool:
    """Whether two loads ended with the same reserved bytes on every card, within 1 %."""
    ends = (
        [card["reserved_bytes"] for card in each["stages"][-1]["memory"]]
        for each in (measured, simulated)
    )
    return all(abs(two - one) <= RESERVED_SHARE * one for one, two in zip(*ends, strict=True))


@contextmanager
def head_first():
    """The loader's other order: the output head just before the last weight of the decoder.

    transformers loads with several threads, so which of the last weights gets its memory first is a
    race: of three measured loads with one map on two cards the head was last in two and next to
    last in one. It decides whether the head finds room in the block that the loader has reserved
    ahead, and so about 1.1 GiB of reserved memory.
    """
    from unittest import mock

    from transformers import core_model_loading

    original = core_model_loading.dot_natural_key

    def key(name: str):
        if name.endswith("output_layer.weight"):
            return original("transformer.encoder.layers.39.self_attention.query_key_value.head")
        return original(name)

    with mock.patch.object(core_model_loading, "dot_natural_key", key):
        yield


def read_load(stored: dict) -> Load:
    """A ``Load`` from its JSON."""
    runs = tuple(
        Run(**run | {"edge": run["edge"] and tuple(run["edge"])}) for run in stored["runs"]
    )
    limits = stored["max_memory_gib"] and tuple(stored["max_memory_gib"])
    keep = {"keep": tuple(stored["keep"])} if "keep" in stored else {}
    return Load(**stored | {"runs": runs, "max_memory_gib": limits} | keep)


def compare(
    load: Load, measured: list[dict], simulated: list[dict]
) -> tuple[list[Figure], list[str]]:
    """All figures of a load side by side, and in words where runs ended differently."""
    figures, differences = [], []
    if [record["run"] for record in measured] != [record["run"] for record in simulated]:
        names = ([record["run"] for record in each] for each in (measured, simulated))
        return [], ["{}: measured the runs {}, simulated {}".format(load.name, *names)]
    for real, ours in zip(measured, simulated, strict=True):
        where = f"{load.name} · {real['run']}"
        ends = [(end_of(record), len(record["stages"])) for record in (real, ours)]
        if ends[0] != ends[1]:
            differences.append(f"{where}: measured {ends[0][0]}, simulated {ends[1][0]}")
            continue
        for stage, other in zip(real["stages"], ours["stages"], strict=True):
            for card, (one, two) in enumerate(zip(stage["memory"], other["memory"], strict=True)):
                most, share = _FURTHER.get((load.name, card), (ALLOCATED_BYTES, RESERVED_SHARE))
                for name, allowed in (
                    ("peak_allocated_bytes", most),
                    ("peak_reserved_bytes", share * one["peak_reserved_bytes"]),
                ):
                    figure = (
                        load.name,
                        real["run"],
                        stage["name"],
                        card,
                        name,
                        one[name],
                        two[name],
                        allowed,
                    )
                    figures.append(Figure(*figure))
        if real["out_of_memory"]:
            figures += message_figures(load, real, ours)
    return figures, differences


def rows(load: Load, measured: list[dict], simulated: list[dict]) -> list[str]:
    """A table in Markdown, a row per run: MiB measured on each card, and how far the simulated
    figure is from it."""
    lines = []
    for real, ours in zip(measured, simulated, strict=True):
        cells = []
        for name in ("peak_allocated_bytes", "peak_reserved_bytes"):
            peaks = [
                [
                    max(stage["memory"][card][name] for stage in each["stages"])
                    for card in range(load.cards)
                ]
                for each in (real, ours)
            ]
            cells.append(
                ", ".join(
                    f"{one / MIB:,.0f} ({(two - one) / MIB:+.0f})"
                    for one, two in zip(*peaks, strict=True)
                )
            )
        end = (
            end_of(real)
            if end_of(real) == end_of(ours)
            else f"{end_of(real)}; simulated {end_of(ours)}"
        )
        lines.append(
            f"| {load.name} | {real['run']} | {' | '.join(cells)} | {end} |".replace("-0)", "+0)")
        )
    return lines


def end_of(record: dict) -> str:
    """How a run ended: "fits", or the phase, the card and the request that failed."""
    from simgpu.oom import parse_out_of_memory

    if not record["out_of_memory"]:
        return "fits"
    message = parse_out_of_memory(record["out_of_memory"])
    tried = f"tried {message.tried_bytes / MIB:.2f} MiB"
    return f"out of memory in {record['stages'][-1]['name']} on card {message.device}, {tried}"


def message_figures(load: Load, real: dict, ours: dict) -> list[Figure]:
    """The other figures of two out-of-memory messages; what other processes held is theirs, not
    this program's."""
    from simgpu.oom import parse_out_of_memory

    messages = [parse_out_of_memory(record["out_of_memory"]) for record in (real, ours)]
    others = sum(real.get("others_bytes") or [0])
    figures = []
    for name in ("free_bytes", "process_bytes", "allocated_bytes", "unallocated_bytes"):
        one, two = (getattr(message, name) for message in messages)
        if name == "free_bytes":
            one += others
        # A size above 1 GiB is printed to a hundredth of a GiB.
        allowed = MESSAGE_BYTES + (0.005 * GIB if one > GIB else 0)
        stage = real["stages"][-1]["name"]
        figures.append(
            Figure(load.name, real["run"], stage, messages[0].device, name, one, two, allowed)
        )
    return figures


def report(arguments: argparse.Namespace) -> int:
    """Print where the simulator and the measurements differ, and a summary; 1 if anything is out of
    bounds."""
    wrong, everything, origins = 0, [], []
    for path in arguments.results:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        figures, differences, lines = [], [], []
        for load, measured, simulated in simulate(results):
            more, others = compare(load, measured, simulated)
            figures += more
            differences += others
            lines += rows(load, measured, simulated)
        outside = [figure for figure in figures if not figure.right]
        wrong += len(outside) + len(differences)
        print(f"\n{path}: {results['provenance']}")
        for name in ("peak_allocated_bytes", "peak_reserved_bytes"):
            apart = [abs(f.simulated - f.measured) / MIB for f in figures if f.name == name]
            print(
                f"  {name:21s}{len(apart):4d} figures, {max(apart, default=0):8.1f} MiB apart at"
                " most"
            )
        for text in differences:
            print("  DIFFERENT", text)
        for figure in outside:
            apart = (figure.simulated - figure.measured) / MIB
            place = f"{figure.load} · {figure.run} · {figure.stage} · card {figure.card}"
            print(
                f"  OUTSIDE   {place}: {figure.name} {figure.measured / MIB:,.1f} MiB, simulated"
                f" {apart:+,.1f}"
            )
        if arguments.table:
            print("\n".join(lines))
        everything += figures
        origins.append(results["provenance"])
    if arguments.picture:
        plot(everything, origins, arguments.picture)
    return 1 if wrong else 0


def plot(figures: list[Figure], origins: list[dict], path: str):
    """Simulated against measured peaks, and how far apart they are. ``origins``: of the files they
    come from."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    looks = {
        "peak_allocated_bytes": ("allocated", "#0072B2", "o"),
        "peak_reserved_bytes": ("reserved", "#E69F00", "^"),
    }
    figure, (both, apart) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for name, (label, colour, marker) in looks.items():
        chosen = [each for each in figures if each.name == name]
        measured = [each.measured / GIB for each in chosen]
        both.plot(
            measured,
            [each.simulated / GIB for each in chosen],
            marker,
            color=colour,
            label=label,
            alpha=0.6,
        )
        distances = [(each.simulated - each.measured) / MIB for each in chosen]
        apart.plot(measured, distances, marker, color=colour, label=label, alpha=0.6)
    both.axline((0, 0), slope=1, color="black", linewidth=1)
    both.set(xlabel="measured, GiB", ylabel="simulated, GiB")
    apart.set(xlabel="measured, GiB", ylabel="simulated less measured, MiB")
    for axes in (both, apart):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    both.legend(frameon=False)
    cards = [
        ", ".join(f"{count} x {name}" for name, count in each["cards"].items()) for each in origins
    ]
    last = origins[-1]
    versions = (
        f"torch {last['torch']}, transformers {last['transformers']}, driver {last['driver']}"
    )
    dates = " and ".join(sorted({each["date"] for each in origins}))
    title = (
        f"Peaks of every stage and card, measured on {' and on '.join(cards)}\n{dates}, {versions}"
    )
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=110)


def main() -> int:
    """Read the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="a checkpoint of random weights")
    write.add_argument("checkpoint")
    for name in ("measure", "one"):
        command = commands.add_parser(name, help="measure on this machine's GPUs")
        command.add_argument("checkpoint")
        command.add_argument("--output", required=True)
        command.add_argument("--only", default="", help="loads whose name contains this")
        command.add_argument("--number", type=int)
        command.add_argument(
            "--trace", default="", help="also write every allocation to files of this name"
        )
        command.add_argument(
            "--traced", nargs="+", default=[""], help="only of loads whose name has one of these"
        )
        command.add_argument(
            "--traced-runs",
            nargs="+",
            default=[""],
            help="and only of runs whose name has one of these",
        )
        command.add_argument(
            "--trace-lines",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="lines of Python in the trace",
        )
    command = commands.add_parser("compare", help="hold the simulator to stored measurements")
    command.add_argument("results", nargs="+", help="files that `measure` wrote")
    command.add_argument(
        "--table", action="store_true", help="print every run as a row of Markdown"
    )
    command.add_argument(
        "--picture", default="", help="draw simulated against measured into this file"
    )
    arguments = parser.parse_args()
    if arguments.command == "compare":
        return report(arguments)
    if arguments.command == "write":
        write_checkpoint(arguments.checkpoint)
    elif arguments.command == "one":
        measure_one(arguments)
    else:
        measure(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
