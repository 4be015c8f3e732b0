"""Figures of real GPUs that are stored in this repository, to be shown beside simulated ones."""

import json
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@dataclass(frozen=True)
class MeasuredStage:
    """A stage of a run on real GPUs.

    Attributes:
        name: of the stage, such as "prefill".
        peak_allocated_bytes: highest in the stage, per card.
        out_of_memory: PyTorch's message if the stage ended by it.
        provenance: "measured on ...", with cards, cap, date and versions.
    """

    name: str
    peak_allocated_bytes: tuple[int, ...]
    out_of_memory: str | None
    provenance: str


def measured_run(file: str, load: str, run: str) -> list[MeasuredStage]:
    """The stages of a run that ``benchmarks/memory.py`` measured.

    ``file`` is a file's name in benchmarks/results, without ".json"; ``load`` and ``run`` are names
    in it, else KeyError. The run "load" is the loading.
    """
    results = _read(file)
    records = {each["load"]["name"]: each["records"] for each in results["loads"]}[load]
    record = {each["run"]: each for each in records}[run]
    stages, origin, cap = record["stages"], results["provenance"], record["cap_bytes"]
    cards = ", ".join(f"{count} x {name}" for name, count in origin["cards"].items())
    provenance = (
        f"measured on {cards}{f' capped to {cap / 1e9:g} GB' if cap else ''}, {origin['date']},"
        f" torch {origin['torch']}, transformers {origin['transformers']}"
    )
    measured = []
    for stage in stages:
        peaks = tuple(card["peak_allocated_bytes"] for card in stage["memory"])
        message = record["out_of_memory"] if stage is stages[-1] else None
        measured.append(MeasuredStage(stage["name"], peaks, message, provenance))
    return measured


def measured_notebook(file: str, number: str) -> list[list[MeasuredStage]]:
    """The stages of every rig of a notebook that ``benchmarks/notebooks.py`` ran on real GPUs;
    KeyError where the file has no such notebook."""
    rigs = {each["notebook"][:2]: each["rigs"] for each in _read(file)["notebooks"]}[number]
    measured = []
    for rig in rigs:
        provenance, stages = rig["provenance"], []
        for each in rig["stages"]:
            figures = (tuple(each["peak_allocated_bytes"]), each["out_of_memory"])
            stages.append(MeasuredStage(each["stage"], *figures, provenance))
        measured += [stages] if provenance.startswith("measured") else []
    return measured


def measured_decoding(file: str) -> dict:
    """What ``benchmarks/decoding.py`` measured, as its file has it, and its provenance in words,
    ``measured_on``.

    ``rows`` have rung, cards, batch, context (positions), tokens_per_second and share_of_limit;
    ``limit`` has what a copy and a large product reach, bytes and operations a second.
    """
    results = _read(file)
    origin = results["provenance"]
    cards = ", ".join(f"{count} x {name}" for name, count in origin["cards"].items())
    names = (name for name in ("torch", "triton", "transformers") if name in origin)
    versions = (f"{name} {origin[name]}" for name in names)
    measured_on = f"measured on {cards}, {origin['date']}, {', '.join(versions)}"
    return results | {"measured_on": measured_on}


def measured_miniature(file: str) -> dict:
    """What a tool of tools/miniature measured on a CPU, as its file has it, and its provenance in
    words, ``measured_on``."""
    results = _read(file)
    versions = ", ".join(f"{name} {each}" for name, each in results["versions"].items())
    return results | {"measured_on": f"measured on the {results['measured']}, {versions}"}


def simulated_choices() -> dict:
    """What ``tools/quantised_choices.py`` found on simulated cards, as its file has it."""
    return _read("simulated/quantised_choices")


def _read(file: str) -> dict:
    return json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))
