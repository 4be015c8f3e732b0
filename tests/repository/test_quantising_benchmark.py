"""The program that measures quantised weights on a GPU, on simulated cards with the miniature; and
the page of what was measured on the CPU."""

import copy
import importlib.util
import json

import pytest
from benchmark_program import ROOT, load_benchmark

from glm4v_nb.miniature import CHECKPOINT
from simgpu import Rig


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")  # as where it is run
        return load_benchmark("quantising")


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_a_difference_of_more_than_is_promised_is_named(benchmark, capsys):
    runs = (benchmark.Run("text, 4 new", images=0, text_tokens=40, new_tokens=4),)
    records = json.loads(
        json.dumps(benchmark.perform("int8", Rig.simulated("L4"), CHECKPOINT, runs))
    )
    names = [(record["run"], [stage["name"] for stage in record["stages"]]) for record in records]
    assert names == [("load", ["load"]), ("text, 4 new", ["prefill", "decode"])]
    assert benchmark.compare("int8", records, records) == []
    other = copy.deepcopy(records)
    other[1]["stages"][1]["memory"][0]["peak_allocated_bytes"] += 5 * 2**20
    (found,) = benchmark.compare("int8", other, records)
    assert found.startswith("int8, text, 4 new, decode")
    del other[1]
    assert len(benchmark.compare("int8", other, records)) == 2


@pytest.fixture(scope="module")
def found():
    stored = ROOT / "benchmarks" / "results" / "miniature_quantised.json"
    return json.loads(stored.read_text(encoding="utf-8"))


SORTS = {"formats": 15, "bits": 2, "parts": 10, "layers": 9}


def test_the_page_says_what_was_measured(found):
    page = (ROOT / "docs" / "quantising.md").read_text(encoding="utf-8")
    assert f"{found['questions']:,} held-out questions" in page
    for name, version in found["versions"].items():
        assert f"{name} {version}" in " ".join(page.split())
    rows = [(name, row) for sort in SORTS for name, row in found[sort].items()]
    assert {sort: len(found[sort]) for sort in SORTS} == SORTS
    for name, row in rows:
        figures = (row[key] for key in ("right", "as_bfloat16", "logits_off"))
        assert f"| {name} | {' | '.join(f'{each:.2%}' for each in figures)} |" in page


def test_what_was_measured_agrees_with_itself(found):
    """Answers by kind, and those that changed, make up the shares of all."""
    count, first = found["questions"], found["formats"]["bfloat16"]
    assert sum(found["kinds"].values()) == count == 2000
    for sort in SORTS:
        for name, row in found[sort].items():
            by_kind = sum(share * found["kinds"][kind] for kind, share in row["kinds"].items())
            assert by_kind / count == pytest.approx(row["right"], abs=2e-4), name
            moved = (row["became_right"] - row["became_wrong"]) / count
            assert first["right"] + moved == pytest.approx(row["right"], abs=2e-4), name
            different = round(count * (1 - row["as_bfloat16"]))
            assert row["became_wrong"] + row["became_right"] <= different, name
            assert len(row["changed"]) == min(different, 10), name
            assert all(each["given"] != each["bfloat16"] for each in row["changed"]), name


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
def test_the_stored_choices_are_what_is_simulated_now():
    """One of the sixteen: what fits, and that its largest batch is one."""
    from glm4v_nb.fit import fit
    from glm4v_nb.measured import simulated_choices
    from tools.quantised_choices import CARDS, WEIGHTS, WORKLOAD

    rows = simulated_choices()["rows"]
    assert [(row["place"], row["weights"]) for row in rows] == [
        (place, weights) for place in CARDS for weights in WEIGHTS
    ]
    row = next(
        row for row in rows if (row["card"], row["count"], row["weights"]) == ("L4", 1, "nf4")
    )
    (now,) = fit("L4", 1, workload=WORKLOAD, weights="nf4").devices
    assert row["verdict"] == "fits"
    assert now.weights_bytes == row["devices"][0]["weights_bytes"]
