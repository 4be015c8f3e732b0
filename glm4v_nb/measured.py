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
        load, run: names in the plan of ``benchmarks/memory.py``; the run "load" is the loading
            itself.

    Raises:
        KeyError: no such load or run in the file.
    """
    results = _read(file)
    records = {each["load"]["name"]: each["records"] for each in results["loads"]}
    record = {each["run"]: each for each in records[load]}[run]
    return [
        MeasuredStage(
            stage["name"],
            tuple(card["peak_allocated_bytes"] for card in stage["memory"]),
            record["out_of_memory"] if stage is record["stages"][-1] else None,
            _provenance(results["provenance"], record["cap_bytes"]),
        )
        for stage in record["stages"]
    ]


def measured_notebook(file: str, number: str) -> list[list[MeasuredStage]]:
    """The stages of every rig of a notebook that ``benchmarks/notebooks.py`` ran on real GPUs, in
    their order."""
    return [
        [
            MeasuredStage(
                stage["stage"],
                tuple(stage["peak_allocated_bytes"]),
                stage["out_of_memory"],
                rig["provenance"],
            )
            for stage in rig["stages"]
        ]
        for rig in _notebook(file, number)["rigs"]
        if rig["provenance"].startswith("measured")
    ]


def _notebook(file: str, number: str) -> dict:
    return {each["notebook"][:2]: each for each in _read(file)["notebooks"]}[number]


def _read(file: str) -> dict:
    return json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))


def _provenance(origin: dict, cap_bytes: int | None) -> str:
    cards = ", ".join(f"{count} x {name}" for name, count in origin["cards"].items())
    cap = f" capped to {cap_bytes / 1e9:g} GB" if cap_bytes else ""
    return (
        f"measured on {cards}{cap}, {origin['date']}, torch {origin['torch']}, transformers"
        f" {origin['transformers']}"
    )
