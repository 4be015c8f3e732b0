"""Models and programs the simulator was not made with: measured, simulated, and held to both."""

import json
from pathlib import Path

import pytest
from benchmark_program import load_benchmark
from rig_fixtures import MIB

from simgpu import Rig

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
STORED = sorted(RESULTS.glob("models_*.json"))
# Cheap, and each of another kind; the weekly workflow simulates all of them.
AGAIN = ["recommender", "BERT-large", "recurrent cell", "encoder layers, autocast"]


@pytest.fixture(scope="module")
def benchmark():
    return load_benchmark("models")


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def pairs():
    """Every measured case and its stored simulation."""
    for path in STORED:
        simulated = read(RESULTS / "simulated" / path.name)["cases"]
        yield from zip(read(path)["cases"], simulated, strict=True)


def test_every_measured_case_is_simulated_to_the_same_end_and_within_the_bounds(benchmark):
    seen = 0
    for real, ours in pairs():
        assert (real["case"], benchmark.end_of(real)) == (ours["case"], benchmark.end_of(ours))
        allocated_mib, reserved_percent = benchmark.bounds(real["case"])
        for stage, card, allocated, reserved in benchmark.apart(real, ours):
            where = (real["case"], stage, card, allocated, reserved)
            assert abs(allocated) <= allocated_mib and abs(reserved) <= reserved_percent, where
            seen += 1
    assert seen >= 80


@pytest.mark.parametrize("name", AGAIN)
def test_a_case_simulated_again_gives_the_stored_figures(benchmark, name):
    (stored,) = [ours for _, ours in pairs() if ours["case"] == name]
    again = benchmark.perform(name, Rig.simulated("H100", 1, ""))
    assert again["figures"] == stored["figures"]


def test_a_figure_that_is_off_is_seen(benchmark):
    real, ours = next(pairs())
    changed = json.loads(json.dumps(ours))
    changed["figures"][0]["peak_allocated_bytes"] += 3 * MIB
    assert benchmark.apart(real, changed)[0][2] - benchmark.apart(real, ours)[0][2] == 3
    assert "+3." in benchmark.table([real], [changed])[2]
