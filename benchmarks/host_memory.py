"""Host memory (RAM) of loading the model, measured on this machine and simulated: one program, two
worlds.

    python benchmarks/host_memory.py measure DIR --output FILE [--full]  # checkpoints go to DIR
    python benchmarks/host_memory.py compare FILE...         # the simulator on the same cases

The checkpoints have random weights in the official layout: 4.0 GB, which is the full size in width
with two layers of forty and two of sixty-three, in one file and in shards, and with ``--full`` the
whole 27.8 GB. Every case is a process of its own, which another one watches: ``RssAnon`` and
``RssFile`` of /proc/PID/status, every two milliseconds. Figures are what the load added to the
process as it was before, with everything imported. On a machine with GPUs the cases with weights on
a card run, too. Linux only.
"""

import argparse
import ctypes
import gc
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

MIB = 2**20
# What the simulator promises: figures as close as SLACK_BYTES, but for what it does not count. Per
# parameter that is whole pages of malloc and Python's own objects, 8 KiB with its share of the
# modules; in a file the first page of every tensor, which making a view reads, with those around it
# that Linux maps along (fault_around_bytes). A first forward pass also reads its code. What malloc
# keeps is next.
SLACK_BYTES = 4 * MIB
OBJECT_BYTES, TOUCHED_BYTES = 12 * 2**10, 64 * 2**10
CODE_BYTES = 64 * MIB
# Of tensors that were converted on the host and freed malloc keeps some: once one of up to 32 MiB
# has been freed, such come from the heap of their thread, which is trimmed only where 64 MiB lie
# free at its end (mallopt(3): M_MMAP_THRESHOLD and M_TRIM_THRESHOLD grow).
HEAP_BYTES = 64 * MIB


@dataclass(frozen=True)
class Case:
    """One process: which checkpoint is loaded, in what type and where to. ``cards``: GPUs that it
    needs."""

    checkpoint: str
    dtype: str
    device_map: str | dict[str, str | int]
    cards: int = 0

    @property
    def name(self) -> str:
        places = (
            {self.device_map} if isinstance(self.device_map, str) else {*self.device_map.values()}
        )
        where = " and ".join(
            sorted(f"card {place}" if isinstance(place, int) else place for place in places)
        )
        return f"{self.checkpoint}, {self.dtype}, {where}"


TOWER_ON_CPU = {"vision_tower": "cpu", "language_model": 0, "lm_head": 0}
LAYERS = {"one file": (2, 2), "shards": (2, 2), "full size": (40, 63)}
SHARD_BYTES = {"one file": 10**11, "shards": 10**9, "full size": 2 * 10**9}
DTYPES = ("bfloat16", "float16", "float32")
CASES = (
    *(Case(layout, dtype, "cpu") for layout in ("one file", "shards") for dtype in DTYPES),
    *(Case("shards", dtype, {"": "disk"}) for dtype in ("bfloat16", "float32")),
    *(Case("shards", dtype, {"": 0}, cards=1) for dtype in DTYPES),
    *(
        Case(layout, dtype, TOWER_ON_CPU, cards=1)
        for layout in ("one file", "shards")
        for dtype in ("bfloat16", "float32")
    ),
    Case("full size", "bfloat16", "cpu"),
    Case("full size", "bfloat16", {"": 0}, cards=1),
    Case("full size", "float32", {"": 0}, cards=1),
    Case("full size", "bfloat16", TOWER_ON_CPU, cards=1),
)  # fmt: skip


def config_of(layout: str):
    """The official configuration with fewer layers."""
    from glm4v_nb.model import official_config

    config = official_config().to_dict()
    config["num_layers"], config["vision_config"]["num_hidden_layers"] = LAYERS[layout]
    return type(official_config()).from_dict(config)


def write_checkpoint(directory: Path, layout: str, weights: bool = True):
    """Random weights in the official layout, a shard in memory at a time; or configuration and
    index alone.

    Raises:
        OSError: the disk is full.
    """
    import torch
    from safetensors.torch import save_file
    from transformers.core_model_loading import revert_weight_conversion

    from glm4v_nb.model import GLM4VForConditionalGeneration

    config = config_of(layout)
    with torch.device("meta"):
        model = GLM4VForConditionalGeneration(config).to(torch.bfloat16)
    shards, size = [{}], 0
    for name, tensor in sorted(revert_weight_conversion(model, model.state_dict()).items()):
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES[layout]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.shape
        size += tensor.nbytes
    directory.mkdir(parents=True, exist_ok=True)
    config.architectures = ["ChatGLMModel"]
    config.save_pretrained(directory)
    places, noise = {}, (torch.randn(2**20) * 0.02).to(torch.bfloat16)
    for number, shapes in enumerate(shards, 1):
        file = (
            f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            if len(shards) > 1
            else "model.safetensors"
        )
        places |= dict.fromkeys(shapes, file)
        if weights:
            tensors = {
                name: noise.repeat(-(-shape.numel() // len(noise)))[: shape.numel()].reshape(shape)
                for name, shape in shapes.items()
            }
            save_file(tensors, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": places}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def load(case: Case, checkpoint: str, **options):
    """The call that is measured and simulated."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=getattr(torch, case.dtype),
        device_map=case.device_map,
        trust_remote_code=False,
        **options,
    )


def run_one(arguments: argparse.Namespace):
    """The process that is watched: says a word on stdout when it gets to a point, and waits for one
    to go on."""
    import torch

    from glm4v_nb.miniature import CHECKPOINT
    from glm4v_nb.workload import Workload, make_prompt, prefill

    def at(point: str):
        print(point, flush=True)
        sys.stdin.readline()

    case = CASES[arguments.number]
    folder = Path(arguments.directory)
    options = {"offload_folder": folder / "offload"} if "disk" in case.name else {}
    # Code that is imported and threads that are started at first use are the process's own. What
    # this first model leaves in malloc's heap would be used again by the next.
    load(case, CHECKPOINT, **options)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    at("before")
    model = load(case, str(folder / case.checkpoint), **options)
    at("loaded")
    if case.dtype == "bfloat16":  # where weights stay in the files, a forward pass has to read them
        with torch.no_grad():
            prefill(model, make_prompt(model, Workload(images=images_of(case), text_tokens=8)))
        at("forward")


def images_of(case: Case) -> int:
    """Images in the prompt; none for the whole tower on a CPU, which would take long."""
    return 0 if case.checkpoint == "full size" and not case.cards else 1


def read_memory(process: int) -> dict[str, int]:
    """RssAnon and RssFile of a process, in bytes."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {
        name: int(fields[field].split()[0]) * 1024
        for name, field in (("anonymous_bytes", "RssAnon"), ("file_bytes", "RssFile"))
    }


def watch(number: int, directory: str) -> dict | None:
    """What a case added to its process, in bytes: highest in the load and at its end, and after a
    forward pass."""
    command = [sys.executable, __file__, "one", directory, "--number", str(number)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    points: dict[str, dict[str, int]] = {}
    peaks, samples = {}, 0
    finished = threading.Event()

    def listen():
        for line in process.stdout:
            points[line.strip()] = read_memory(process.pid)
            process.stdin.write("\n")
            process.stdin.flush()
        finished.set()

    threading.Thread(target=listen, daemon=True).start()
    while not finished.wait(0.002):
        if "before" in points and "loaded" not in points:
            try:
                now = read_memory(process.pid)
            except (OSError, KeyError):  # it has been killed, and has no memory any more
                continue
            samples += 1
            peaks = {name: max(size, peaks.get(name, 0)) for name, size in now.items()}
    if process.wait() or "loaded" not in points:
        return None
    before = points["before"]
    figures = {
        f"peak_{name}": max(points["loaded"][name], peaks.get(name, 0)) - before[name]
        for name in before
    }
    for point, sizes in points.items():
        figures |= {
            f"{point}_{name}": sizes[name] - before[name] for name in before if point != "before"
        }
    return figures | {"samples": samples}


def provenance() -> dict:
    """Machine, versions, date."""
    import accelerate
    import psutil
    import safetensors
    import torch
    import transformers
    from transformers.core_model_loading import GLOBAL_WORKERS

    cards = Counter(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return {
        "cores": psutil.cpu_count(),
        "ram_bytes": psutil.virtual_memory().total,
        "swap_bytes": psutil.swap_memory().total,
        "cards": dict(cards),
        "loader_threads": GLOBAL_WORKERS,
        "system": (
            f"{platform.system()} {platform.release().partition('-')[0]} {platform.machine()}"
        ),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def measure(arguments: argparse.Namespace):
    """Every case in a process of its own; results are written after each."""
    origin = provenance()
    results = {"provenance": origin, "cases": []}
    for layout in LAYERS:
        numbers = [
            number
            for number, case in enumerate(CASES)
            if case.checkpoint == layout
            and case.cards <= sum(origin["cards"].values())
            and arguments.only in case.name
            and (arguments.full or layout != "full size")
        ]
        directory = Path(arguments.directory) / layout
        if not numbers:
            continue
        try:
            write_checkpoint(directory, layout)
            size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
            largest = max(path.stat().st_size for path in directory.glob("*.safetensors"))
            for number in numbers:
                print(CASES[number].name, flush=True)
                figures = watch(number, arguments.directory)
                if figures is None:
                    print(f"error: {CASES[number].name} ended without a result", file=sys.stderr)
                    continue
                case = asdict(CASES[number]) | {
                    "checkpoint_bytes": size,
                    "largest_file_bytes": largest,
                }
                results["cases"].append({"case": case, "measured": figures})
                Path(arguments.output).write_text(
                    json.dumps(results, indent=1) + "\n", encoding="utf-8"
                )
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            shutil.rmtree(Path(arguments.directory) / "offload", ignore_errors=True)


@dataclass(frozen=True)
class Figure:
    """One figure in bytes: measured, the least and the most it is by the simulator, and how far
    outside is allowed."""

    case: str
    name: str
    measured: int
    least: int
    most: int
    allowed: int

    @property
    def right(self) -> bool:
        return self.least - SLACK_BYTES <= self.measured <= self.most + self.allowed


def simulate(case: Case) -> tuple:
    """The ``HostMemory`` of a case, its parameters, and those that a forward pass as measured does
    not read."""
    from glm4v_nb.placement import meta_model
    from simgpu import Rig

    with (
        tempfile.TemporaryDirectory() as folder,
        Rig.simulated("H100", max(case.cards, 1), "") as rig,
    ):
        write_checkpoint(Path(folder), case.checkpoint, weights=False)
        load(case, folder)
        parameters = dict(meta_model(checkpoint=folder).named_parameters())
    # Of the embedding a CPU reads no more than the rows of the prompt.
    unread = ("language_model.embed_tokens", *(() if images_of(case) else ("vision_tower",)))
    return (
        rig.host.memory,
        parameters,
        [size for name, size in parameters.items() if name.startswith(unread)],
    )


def compare(results: dict) -> list[Figure]:
    """All figures of a file of measurements beside the simulated ones; without those of cases on
    disk."""
    found = []
    for each in results["cases"]:
        case, measured = read_case(each["case"]), each["measured"]
        if "disk" in case.name:
            continue
        host, parameters, unread = simulate(case)
        bounds = {
            "peak_anonymous_bytes": (
                host.sequential_peak_anonymous_bytes,
                host.peak_anonymous_bytes,
            ),
            "loaded_anonymous_bytes": (host.anonymous_bytes,) * 2,
            "peak_file_bytes": (host.peak_file_bytes,) * 2,
            "loaded_file_bytes": (host.file_bytes,) * 2,
        }
        if not case.cards and "forward_file_bytes" in measured:
            read = host.view_bytes - sum(parameter.nbytes for parameter in unread)
            bounds["forward_file_bytes"] = (read, read)
        for name, (least, most) in bounds.items():
            each_takes = TOUCHED_BYTES if "file" in name else OBJECT_BYTES
            allowed = SLACK_BYTES + each_takes * len(parameters)
            allowed += CODE_BYTES if "forward" in name else 0
            if (
                "anonymous" in name
                and case.cards
                and host.peak_anonymous_bytes > host.anonymous_bytes
            ):
                allowed += HEAP_BYTES * results["provenance"]["loader_threads"]
            found.append(Figure(case.name, name, measured[name], least, most, allowed))
    return found


def read_case(stored: dict) -> Case:
    """A ``Case`` from its JSON."""
    return Case(**{name: stored[name] for name in Case.__dataclass_fields__})


def report(arguments: argparse.Namespace) -> int:
    """Print measured beside simulated; 1 if anything is out of bounds."""
    wrong = 0
    for path in arguments.results:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        print(f"{path}, measured: {results['provenance']}")
        for figure in compare(results):
            simulated = f"{figure.most / MIB:,.0f}"
            if figure.least != figure.most:
                simulated = f"{figure.least / MIB:,.0f} to {simulated}"
            print(
                f"  {figure.case:44s}{figure.name:24s}measured {figure.measured / MIB:9,.1f} MiB, "
                f"simulated {simulated}{'' if figure.right else '  OUTSIDE'}"
            )
            wrong += not figure.right
    return 1 if wrong else 0


def main() -> int:
    """Read the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("measure", help="measure on this machine")
    command.add_argument(
        "directory", help="for the checkpoints; needs their size on a disk, not on a tmpfs"
    )
    command.add_argument("--output", required=True, help="JSON file for the results")
    command.add_argument("--only", default="", help="cases whose name contains this")
    command.add_argument(
        "--full", action="store_true", help="the full size as well, 27.8 GB on disk"
    )
    command = commands.add_parser("one", help="the process of a case, which `measure` starts")
    command.add_argument("directory")
    command.add_argument("--number", type=int, required=True)
    command = commands.add_parser("compare", help="hold the simulator to stored measurements")
    command.add_argument("results", nargs="+", help="files that `measure` wrote")
    arguments = parser.parse_args()
    if arguments.command == "compare":
        return report(arguments)
    if arguments.command == "one":
        run_one(arguments)
    else:
        measure(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
