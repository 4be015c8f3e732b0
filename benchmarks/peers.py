"""What other programs say of the same runs, beside the measurement: error of the peak in percent.

    pip install hf-mem torch-kitsune
    python benchmarks/peers.py run     # minutes; writes results/peers.json
    python benchmarks/peers.py table   # from what is stored

Six language models, four workloads each, as ``models.py`` measured them. Every peer is asked for
what it offers nearest to the workload, through its own functions:

- simgpu: the program itself, on simulated cards.
- torch's MemTracker: the program itself, on fake tensors.
- accelerate estimate-memory: its size in float16, or its sum for training with Adam.
- hf-mem: weights and KV cache of that many positions.
- torch-kitsune: its prediction for a batch of that shape, in inference or training.
"""

import argparse
import importlib.metadata
import itertools
import json
import multiprocessing
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import models
import torch
import transformers

RESULTS = Path(__file__).parent / "results"
OUTPUT = RESULTS / "peers.json"
PICTURE = Path(__file__).parents[1] / "docs" / "peers.png"
PEERS = {
    "simgpu": "torch",
    "MemTracker": "torch",
    "accelerate": "accelerate",
    "hf-mem": "hf-mem",
    "torch-kitsune": "torch-kitsune",
}
# Names as of the stages in models.py: samples, positions of the prompt, new tokens.
WORKLOADS = {
    "prefill 1x2000": (1, 2000, 1),
    "prefill 6x500": (6, 500, 1),
    "padded 3x700, 24 new": (3, 700, 24),
    "train 2x512": (2, 512, 0),
}


def measured(results: dict) -> dict[tuple[str, str], int]:
    """Peaks of allocated bytes by model and workload; training is the larger of its two steps."""
    peaks: dict[tuple[str, str], int] = {}
    for record in results["cases"]:
        if record["case"] not in models.LANGUAGE_MODELS:
            continue
        for figure in record["figures"]:
            stage = figure["stage"].partition(", step")[0]
            if stage in WORKLOADS:
                key = (record["case"], stage)
                peaks[key] = max(peaks.get(key, 0), figure["peak_allocated_bytes"])
    return peaks


def by_simgpu(name: str, card: str) -> dict[str, int]:
    """All workloads of one model, in one simulation."""
    from simgpu import Rig

    record = models.perform(name, Rig.simulated(card, 1, ""))
    peaks = measured({"cases": [record]})
    return {workload: peaks[name, workload] for workload in WORKLOADS}


class TrackedStages:
    """Stands for a rig: MemTracker around every stage, on fake tensors."""

    provenance = "simulated"

    def __init__(self):
        self.external, self.peaks = [], {}

    @contextmanager
    def stage(self, name: str):
        from torch.distributed._tools.mem_tracker import MemTracker

        self.tracker = tracker = MemTracker()
        tracker.track_external(*self.external)
        with tracker:
            yield
        found = tracker.get_tracker_snapshot("peak")
        peak = max(sizes["Total"] for place, sizes in found.items() if place.type == "cuda")
        workload = name.partition(", step")[0]
        self.peaks[workload] = max(peak, self.peaks.get(workload, 0))

    def repeat(self, step: Callable, count: int):
        for _ in range(count):
            self.tracker.reset_mod_stats()  # or it refuses a module's second call
            step()


def by_mem_tracker(name: str, card: str) -> dict[str, int]:
    """The program of ``models.language_model``, on fake tensors that say they are on a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers.initialization import no_init_weights

    kind, sizes = models.LANGUAGE_MODELS[name]
    config, rig = models.config_of(kind, sizes), TrackedStages()
    torch.set_default_dtype(models.BF16)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            with torch.device("cuda"), no_init_weights():
                model = models.class_of(config, "AutoModelForCausalLM")(config).eval()
            model.tie_weights()  # which is left out with the initialisation
            rig.external = [model]
            bench = models.Bench(rig, Path())
            bench.stage = rig.stage
            bench.watch = rig.external.append  # an optimiser's numbers count as well
            models.workloads(bench, model)
    finally:
        torch.set_default_dtype(torch.float32)
    return rig.peaks


def by_accelerate(name: str, card: str) -> dict[str, int]:
    """The row "float16" that estimate-memory prints; it needs a network, so by its functions."""
    from accelerate import init_empty_weights
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    kind, sizes = models.LANGUAGE_MODELS[name]
    with init_empty_weights():  # the class and type that the command takes
        model = transformers.AutoModel.from_config(models.config_of(kind, sizes))
    total, _ = calculate_maximum_sizes(model)
    training = max(estimate_training_usage(total, "float16").values())
    return {key: total // 2 if new else training for key, (_, _, new) in WORKLOADS.items()}


def by_hf_mem(name: str, card: str) -> dict[str, int]:
    """Weights from the header of the checkpoint, and the KV cache; it has nothing for training."""
    from hf_mem.safetensors.kv_cache import compute_safetensors_kv_cache_size
    from hf_mem.safetensors.metadata import parse_safetensors_metadata

    kind, sizes = models.LANGUAGE_MODELS[name]
    config = models.config_of(kind, sizes)
    with tempfile.TemporaryDirectory() as folder:
        cls = models.class_of(config, "AutoModelForCausalLM")
        models.write_weights(Path(folder), cls, config, models.BF16)
        with (Path(folder) / "model.safetensors").open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    metadata = parse_safetensors_metadata({"Transformer": header})
    found = {}
    for workload, (rows, positions, new) in WORKLOADS.items():
        if new:
            cache = compute_safetensors_kv_cache_size(
                cache_dtype="BF16",
                config=config.to_dict(),
                max_model_len=positions + new,
                batch_size=rows,
            )
            found[workload] = metadata.bytes_count + cache
    return found


def by_kitsune(name: str, card: str) -> dict[str, int]:
    """Its prediction for a batch of this shape."""
    from kitsune.predict import predict_memory

    kind, sizes = models.LANGUAGE_MODELS[name]
    config = models.config_of(kind, sizes)
    with torch.device("meta"):
        model = models.class_of(config, "AutoModelForCausalLM")(config).to(models.BF16)
    found = {}
    for workload, (rows, positions, new) in WORKLOADS.items():
        options = {"optimizer": "adamw", "training": not new}
        result = predict_memory(model, (positions,), rows, models.BF16, **options)
        found[workload] = result.total_bytes
    return found


ASKED = {
    "simgpu": by_simgpu,
    "MemTracker": by_mem_tracker,
    "accelerate": by_accelerate,
    "hf-mem": by_hf_mem,
    "torch-kitsune": by_kitsune,
}


def answer(peer: str, name: str, card: str, truth: dict) -> dict:
    """What one peer says of one model, and how long it took."""
    models.class_of(models.config_of(*models.LANGUAGE_MODELS[name]), "AutoModelForCausalLM")
    started = time.perf_counter()  # what is imported is not counted
    try:
        found, error = ASKED[peer](name, card), None
    except Exception as caught:  # a peer that cannot answer is a finding
        found, error = {}, f"{type(caught).__name__}: {str(caught)[:200]}"
    seconds = round(time.perf_counter() - started, 1)
    packages = sorted({"torch", "transformers", PEERS[peer]})
    versions = {package: importlib.metadata.version(package) for package in packages}
    peaks = [
        {
            "workload": workload,
            "measured_bytes": truth[name, workload],
            "predicted_bytes": found.get(workload),
        }
        for workload in WORKLOADS
    ]
    record = {"peer": peer, "model": name, "seconds": seconds, "error": error}
    return record | {"versions": versions, "date": time.strftime("%Y-%m-%d"), "peaks": peaks}


def run(path: Path, only: list[str], workers: int):
    """Ask every peer for every model, each in a process of its own; peers.json has the answers."""
    results = json.loads(path.read_text(encoding="utf-8"))
    (card,) = results["provenance"]["cards"]
    truth = measured(results)
    stored = json.loads(OUTPUT.read_text(encoding="utf-8")) if OUTPUT.exists() else {"answers": []}
    answers = [each for each in stored["answers"] if only and each["peer"] not in only]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as processes:
        asked = [
            processes.submit(answer, peer, name, card, truth)
            for peer in only or ASKED
            for name in models.LANGUAGE_MODELS
        ]
        for future in as_completed(asked):
            record = future.result()
            answers.append(record)
            error = record["error"] or ""
            print(f"{record['peer']:14s} {record['model']:12s} {record['seconds']:6.1f} s  {error}")
    order = list(itertools.product(PEERS, models.LANGUAGE_MODELS))
    answers.sort(key=lambda record: order.index((record["peer"], record["model"])))
    text = json.dumps({"measured": path.name, "answers": answers}, indent=1) + "\n"
    OUTPUT.write_text(text, encoding="utf-8")


def errors(answers: list[dict], peer: str, workload: str) -> list[float | None]:
    """Percent by which a peer's answers for a workload are off, a model each; None: no answer."""
    found = []
    for record in answers:
        for peak in record["peaks"]:
            if (record["peer"], peak["workload"]) == (peer, workload):
                said, truth = peak["predicted_bytes"], peak["measured_bytes"]
                found.append(None if said is None else 100 * (said / truth - 1))
    return found


def table(stored: dict) -> str:
    """Markdown: the furthest error of each peer and workload over the models, and its seconds."""
    lines = [
        "| peer | " + " | ".join(WORKLOADS) + " | seconds a model |",
        "|---|" + "---|" * (len(WORKLOADS) + 1),
    ]
    answers = stored["answers"]
    for peer in PEERS:
        cells = []
        for workload in WORKLOADS:
            all_of = errors(answers, peer, workload)
            some = [each for each in all_of if each is not None]
            missing = len(all_of) - len(some)
            cell = f"{min(some):+.2f} to {max(some):+.2f} %" if some else "no answer"
            cells.append(cell + (f" ({missing} no answer)" if some and missing else ""))
        times = [record["seconds"] for record in answers if record["peer"] == peer]
        cells.append(f"{sum(times) / len(times):.1f}")
        lines.append(f"| {peer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(stored: dict, path: Path):
    """Every answer as its error in percent, a row a peer."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    looks = zip(WORKLOADS, ("#0072B2", "#56B4E9", "#009E73", "#D55E00"), "o^sD", strict=True)
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for number, (workload, colour, marker) in enumerate(looks):
        for row, peer in enumerate(PEERS):
            found = [each for each in errors(stored["answers"], peer, workload) if each is not None]
            height = [row + 0.15 * (number - 1.5)] * len(found)
            label = workload if row == 0 else None
            axes.plot(found, height, marker, color=colour, label=label, alpha=0.8, markersize=6)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(PEERS)), PEERS)
    axes.invert_yaxis()
    axes.set(xlabel="error of the predicted peak, percent of the measured one (one H100)")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS / "models_h100.json")
    parser.add_argument("--only", nargs="*", default=[], help="these peers; others stay as stored")
    parser.add_argument("--workers", type=int, default=1, help="models at a time")
    arguments = parser.parse_args()
    if arguments.action == "run":
        run(arguments.results, arguments.only, arguments.workers)
        plot(json.loads(OUTPUT.read_text(encoding="utf-8")), PICTURE)
    print(table(json.loads(OUTPUT.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    sys.exit(main())
