"""The simulator held to measurements on real GPUs, and the program that compares them: it must
notice a difference."""

import copy
import json
import os
import re
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import pytest
from benchmark_program import load_benchmark
from rig_fixtures import MIB

from simgpu import Rig

ROOT = Path(__file__).parents[2]
LIBRARIES = ("torch", "transformers", "accelerate")
STORED = sorted((ROOT / "benchmarks" / "results").glob("memory_*.json"))
# The loads on two H200 are those on two H100 once more: simulated again by the weekly workflow.
AGAIN = [path for path in STORED if "h200" not in path.stem or os.environ.get("EVERY_MEASUREMENT")]


@pytest.fixture(scope="module")
def benchmark():
    return load_benchmark("memory")


@pytest.fixture(scope="module")
def small(benchmark):
    """A load with a run that fits, one under a cap that is too small for it, and a training
    step."""
    return benchmark.Load(
        "small plan",
        cards=2,
        runs=(
            benchmark.Run("text", images=0, text_tokens=64, new_tokens=4),
            benchmark.Run("batch", images=0, text_tokens=512, batch_size=8),
            *benchmark.edges("batch", -300, 64, images=0, text_tokens=512, batch_size=8),
            benchmark.Run(
                "step",
                images=0,
                text_tokens=16,
                train="lora",
                gradient_checkpointing=True,
                optimizer="AdamW",
            ),
        ),
    )


@pytest.fixture(scope="module")
def records(benchmark, small):
    """Stands for a measurement: what the simulator itself finds, as it would be stored."""
    found = benchmark.perform(small, Rig.simulated("H100", 2), benchmark.OFFICIAL)
    return json.loads(json.dumps(found))


@pytest.fixture(scope="module")
def repeated(benchmark, small, records):
    """The load as it is read back from a file, run again under the caps of the records."""
    results = {"load": json.loads(json.dumps(asdict(small))), "records": records}
    stored = {"provenance": {"cards": {"NVIDIA H100 80GB HBM3": 2}}, "loads": [results]}
    (found,) = benchmark.simulate(stored)
    return found


def test_a_plan_has_runs_that_fit_and_runs_that_do_not(records):
    assert [bool(record["out_of_memory"]) for record in records] == [
        False,
        False,
        False,
        True,
        False,
        False,
    ]
    assert [stage["name"] for stage in records[-1]["stages"]] == ["backward", "optimizer"]


def test_the_same_figures_are_found_right(benchmark, repeated):
    figures, differences = benchmark.compare(*repeated)
    assert differences == []
    assert len(figures) == 2 * 2 * (1 + 2 + 1 + 1 + 1 + 2) + 4
    assert all(figure.right for figure in figures)
    assert all(figure.simulated == figure.measured for figure in figures)


@pytest.mark.parametrize(
    ("name", "change", "right"),
    [
        ("peak_allocated_bytes", 4 * MIB, True),
        ("peak_allocated_bytes", 4 * MIB + 512, False),
        ("peak_reserved_bytes", 100 * MIB, True),
        ("peak_reserved_bytes", 600 * MIB, False),
    ],
)
def test_a_figure_that_is_too_far_away_is_noticed(benchmark, small, records, name, change, right):
    measured = copy.deepcopy(records)
    measured[1]["stages"][0]["memory"][1][name] += change
    figures, differences = benchmark.compare(small, measured, records)
    assert differences == []
    assert [figure.name for figure in figures if not figure.right] == ([] if right else [name])


@pytest.mark.parametrize(
    ("pattern", "other"),
    [
        (r"Tried to allocate [\d.]+ MiB", "Tried to allocate 99.00 MiB"),
        (r"GPU \d has", "GPU 5 has"),
    ],
)
def test_another_request_or_card_in_the_message_is_another_end(
    benchmark, small, records, pattern, other
):
    measured = copy.deepcopy(records)
    measured[3]["out_of_memory"], changes = re.subn(pattern, other, measured[3]["out_of_memory"])
    assert changes == 1
    figures, differences = benchmark.compare(small, measured, records)
    assert len(differences) == 1
    assert "small plan · batch, cap -300 MiB: measured out of memory in prefill" in differences[0]


def test_a_run_that_fitted_on_one_side_only_is_noticed(benchmark, small, records):
    measured = copy.deepcopy(records)
    measured[3]["out_of_memory"] = None
    assert benchmark.compare(small, measured, records)[1] == [
        "small plan · batch, cap -300 MiB: measured fits, simulated " + benchmark.end_of(records[3])
    ]


def test_the_figures_of_a_message_are_compared_and_other_processes_are_left_out(
    benchmark, small, records
):
    measured = copy.deepcopy(records)
    measured[3]["others_bytes"] = [0, 0]
    message = measured[3]["out_of_memory"]
    free = message.partition("of which ")[2].partition(" is free")[0]
    measured[3]["out_of_memory"] = message.replace(f"of which {free}", "of which 1.00 GiB")
    outside = [
        figure.name for figure in benchmark.compare(small, measured, records)[0] if not figure.right
    ]
    assert outside == ["free_bytes"]
    real = benchmark.compare(small, records, records)[0]
    figure = next(figure for figure in real if figure.name == "free_bytes")
    measured[3]["others_bytes"] = [figure.measured - 2**30, 0]
    assert all(figure.right for figure in benchmark.compare(small, measured, records)[0])


def test_the_report_ends_with_one_where_anything_differs(
    benchmark, small, records, repeated, tmp_path, capsys, monkeypatch
):
    origin = {
        "cards": {"NVIDIA H100 80GB HBM3": 2},
        "date": "today",
        "torch": "2",
        "transformers": "5",
        "driver": "6",
    }

    def simulate_once(results):
        """The same load both times: what was measured of it changes, the simulation does not."""
        load, _, simulated = repeated
        return [(load, results["loads"][0]["records"], simulated)]

    monkeypatch.setattr(benchmark, "simulate", simulate_once)
    for change, code in ((0, 0), (512 * MIB, 1)):
        measured = copy.deepcopy(records)
        measured[0]["stages"][0]["memory"][0]["peak_allocated_bytes"] += change
        results = {"provenance": origin, "loads": [{"load": asdict(small), "records": measured}]}
        path, picture = tmp_path / "results.json", tmp_path / "picture.png"
        path.write_text(json.dumps(results))
        monkeypatch.setattr(
            "sys.argv", ["memory.py", "compare", str(path), "--picture", str(picture)]
        )
        assert benchmark.main() == code
        assert ("OUTSIDE" in capsys.readouterr().out) is bool(code)
        assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    ("path", "number"),
    [
        pytest.param(path, number, id=f"{path.stem}-{each['load']['name']}")
        for path in AGAIN
        for number, each in enumerate(json.loads(path.read_text(encoding="utf-8"))["loads"])
    ],
)
def test_the_simulator_agrees_with_what_was_measured_and_with_what_is_stored(
    benchmark, path, number
):
    results = json.loads(path.read_text(encoding="utf-8"))
    shared = results["provenance"].get("shared", {"loads": ()})["loads"]
    results["loads"] = results["loads"][number : number + 1]
    ((load, measured, simulated),) = benchmark.simulate(results)
    figures, differences = benchmark.compare(load, measured, simulated)
    assert differences == []
    assert [figure for figure in figures if not figure.right] == []
    page = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8").splitlines()
    assert [row for row in benchmark.rows(load, measured, simulated) if row not in page] == []
    stored = json.loads((path.parent / "simulated" / path.name).read_text(encoding="utf-8"))
    if all(version(name).startswith(stored["provenance"][name]) for name in LIBRARIES):
        assert json.loads(json.dumps(simulated)) == stored["loads"][number]["records"], (
            "python tools/accuracy.py --simulate stores them again"
        )
    for real, ours in zip(measured, simulated, strict=True):
        for stage, other in zip(real["stages"], ours["stages"], strict=True):
            for card, (one, two) in enumerate(zip(stage["memory"], other["memory"], strict=True)):
                # Context, kernels and driver, where nobody else was on the card.
                apart = one["outside_bytes"] - two["outside_bytes"]
                alone = load.name not in shared or card > 0
                assert abs(apart) <= 4 * MIB or not alone, (real["run"], stage["name"])


def test_enough_is_measured_and_much_of_it_close_to_the_edge_of_a_cap():
    records = [
        record
        for path in STORED
        for load in json.loads(path.read_text(encoding="utf-8"))["loads"]
        for record in load["records"]
    ]
    assert len([record for record in records if record["run"] != "load"]) >= 30
    assert len([record for record in records if "cap" in record["run"]]) >= 10
    assert len([record for record in records if record["out_of_memory"]]) >= 10


def test_a_load_whose_head_came_first_is_simulated_in_that_order(benchmark):
    def reserved():
        records = benchmark.perform(
            benchmark.Load("two cards", cards=2), Rig.simulated("H100", 2), benchmark.OFFICIAL
        )
        return [
            card["reserved_bytes"] // MIB for card in records[0]["stages"][0]["memory"]
        ], records[0]

    usual, last = reserved()
    with benchmark.head_first():
        other, first = reserved()
    assert usual[1] - other[1] > 1000, "the hole that the head does not fit into"
    assert not benchmark.same_reserved(first, last)
    assert benchmark.same_reserved(first, first)


def test_a_random_checkpoint_is_one_that_loads(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    from glm4v_nb.miniature import CHECKPOINT
    from glm4v_nb.model.configuration import read_config

    written = load_benchmark("random_checkpoint")
    monkeypatch.setattr(written, "SHARD_BYTES", 3 * 10**6)
    written.write(tmp_path, read_config(CHECKPOINT))
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    layer = model.language_model.layers[0]
    assert bool((layer.input_layernorm.weight == 1).all())
    assert bool((layer.self_attn.q_proj.bias == 0).all())
    matrices = (model.lm_head, layer.mlp.down_proj, model.vision_tower.layers[0].mlp.fc1)
    for matrix in matrices:
        assert float(matrix.weight.detach().float().std()) == pytest.approx(0.02, rel=0.05)
