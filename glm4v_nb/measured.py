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

    Args:
        file: name of a file in benchmarks/results, without ".json".
        load, run: names in the plan of ``benchmarks/memory.py``; the run "load" is the loading.

    Raises:
        KeyError: no such load or run in the file.
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
    """The stages of every rig of a notebook that ``benchmarks/notebooks.py`` ran on real GPUs.

    Raises:
        KeyError: no such notebook in the file.
    """
    rigs = {each["notebook"][:2]: each["rigs"] for each in _read(file)["notebooks"]}[number]
    measured = []
    for rig in rigs:
        if rig["provenance"].startswith("measured"):
            stages = [
                (each["stage"], tuple(each["peak_allocated_bytes"]), each["out_of_memory"])
                for each in rig["stages"]
            ]
            measured.append([MeasuredStage(*stage, rig["provenance"]) for stage in stages])
    return measured


def _read(file: str) -> dict:
    return json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))
