"""Fast decoding's memory: measured on a card, simulated, and held to both."""

import json
from pathlib import Path

import pytest
from benchmark_program import load_benchmark
from packaging.version import Version
from rig_fixtures import MIB

from simgpu import graphs

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SIMULATED = sorted((RESULTS / "simulated").glob("decoding_*.json"))
# Among them the longest, and one with an image and 64 tokens.
SOME = slice(1, 3)


def stored(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_what_was_measured_is_simulated():
    measured = [stored(path) for path in RESULTS.glob("decoding_*.json")]
    known = [stored(RESULTS / path.name)["memory"] for path in SIMULATED]
    assert known and all(each["memory"] in known for each in measured if "memory" in each)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("no tiles are known")))
        patch.syspath_prepend(str(RESULTS.parent))
        yield load_benchmark("decoding")


def apart(measured: list[dict], simulated: list[dict]) -> dict[str, list[int]]:
    """By how many bytes the simulated figures differ."""
    names = [name for name in measured[0] if name.endswith("_bytes")]
    pairs = list(zip(measured, simulated, strict=True))
    assert all(real[name] == ours[name] for real, ours in pairs for name in real.keys() - names)
    return {name: [ours[name] - real[name] for real, ours in pairs] for name in names}


@pytest.mark.parametrize("path", SIMULATED, ids=lambda path: path.stem)
def test_every_measured_peak_is_simulated_within_4_mib(path):
    found = apart(stored(RESULTS / path.name)["memory"], stored(path)["memory"])
    assert len(found) == 5 and max(abs(each) for far in found.values() for each in far) <= 4 * MIB
    # All that differs: seed and offset, of PyTorch 2.11 alone, and the segment that they are in.
    assert set(found["peak_allocated_bytes"]) == {-1024}
    assert set(found["peak_reserved_bytes"]) <= {0, -2 * MIB}


@pytest.mark.parametrize("path", SIMULATED, ids=lambda path: path.stem)
def test_by_the_rule_of_the_pytorch_that_was_measured_figures_are_equal(
    benchmark, monkeypatch, path
):
    monkeypatch.setattr(graphs, "SEEDS_WHEN_DRAWN", Version("99"))
    measured = stored(RESULTS / path.name)
    found = apart(measured["memory"][SOME], benchmark.simulate(measured, SOME))
    assert len(found) == 5 and not any(each for far in found.values() for each in far)


@pytest.mark.parametrize("path", SIMULATED, ids=lambda path: path.stem)
def test_a_case_simulated_again_gives_the_stored_figures(benchmark, path):
    first = slice(1)
    found = benchmark.simulate(stored(RESULTS / path.name), first)
    assert found == stored(path)["memory"][first]
