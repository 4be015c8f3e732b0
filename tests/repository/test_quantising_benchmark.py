"""The program that measures quantised weights on a GPU, on simulated cards with the miniature; and
the page of what was measured on the CPU."""

import argparse
import importlib.util
import json
import os
from dataclasses import asdict
from pathlib import Path

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
def test_a_load_of_a_format_is_one_of_memory_py(benchmark):
    runs = (benchmark.Run("text, 4 new", images=0, text_tokens=40, new_tokens=4),)
    held, after = {}, []
    for weights in ("bfloat16", "int8"):
        load = benchmark.named(weights, runs)
        records = benchmark.perform(
            load, Rig.simulated("H100"), CHECKPOINT, after=lambda *given: after.append(given[2])
        )
        names = [(one["run"], [stage["name"] for stage in one["stages"]]) for one in records]
        assert names == [("load", ["load"]), ("text, 4 new", ["prefill", "decode"])]
        held[weights] = records[0]["stages"][0]["memory"][0]["allocated_bytes"]
    assert [run.name for run in after] == ["text, 4 new"] * 2
    assert 4e6 < held["bfloat16"] - held["int8"] < 5e6  # 4,454,400 numbers are quantised


def cases(loads) -> set[tuple[str, int | None]]:
    """Format and cap of all that was asked to be loaded, or run."""
    caps = {}
    for load in loads:
        found = caps.setdefault(load["weights"] or "bfloat16", set())
        found |= {load["cap_bytes"]} | {run["cap_bytes"] for run in load["runs"]}
    return {(weights, cap) for weights, found in caps.items() for cap in found}


def test_the_plan_has_every_format_whole_and_under_every_cap(benchmark):
    found = cases(map(asdict, benchmark.PLAN))
    assert {(each, cap) for each in benchmark.FORMATS for cap in benchmark.CAPS} <= found
    assert len({load.name for load in benchmark.PLAN}) == len(benchmark.PLAN)


def test_processes_that_run_at_once_fit_on_the_card_together(benchmark, monkeypatch, tmp_path):
    running, most = [], []

    class Process:
        """Ends when asked for the third time, and has then written its part."""

        def __init__(self, command):
            self.number = int(command[command.index("--number") + 1])
            self.part, self.asked = command[command.index("--output") + 1], 0
            running.append(self.number)
            most.append(sum(benchmark.room(benchmark.PLAN[number]) for number in running))

        def poll(self):
            self.asked += 1
            if self.asked < 3:
                return None
            running.remove(self.number)
            content = {"load": self.number, "provenance": {"cards": {"a card": 1}}}
            Path(self.part).write_text(json.dumps(content), encoding="utf-8")
            return 0

        def kill(self):
            pass

        def wait(self):
            return 0

    monkeypatch.setattr(benchmark.subprocess, "Popen", Process)
    monkeypatch.setattr(benchmark.time, "sleep", lambda seconds: None)
    output = tmp_path / "found.json"
    options = {"only": [], "at_once": 6, "seconds": 60, "traced": [], "card": 82}
    benchmark.measure(argparse.Namespace(checkpoint="somewhere", output=output, **options))
    found = json.loads(output.read_text(encoding="utf-8"))
    assert [one["load"] for one in found["loads"]] == [*range(len(benchmark.PLAN))]
    assert found["provenance"] == {"cards": {"a card": 1}}
    assert max(most) <= 82


def test_a_file_is_merged_into_one_of_the_same_card_and_versions(benchmark, tmp_path):
    def write(name, card, *loads):
        content = {"provenance": {"cards": {card: 1}, "date": name}}
        content["loads"] = [{"load": {"name": load}, "seconds": name} for load in loads]
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
        return tmp_path / name

    into = write("old", "H200", "nf4", "int8")
    benchmark.merge(write("new", "H200", "int8", "int4"), into)
    found = json.loads(into.read_text(encoding="utf-8"))
    seconds = {each["load"]["name"]: each["seconds"] for each in found["loads"]}
    assert seconds == {"nf4": "old", "int8": "new", "int4": "new"}
    with pytest.raises(ValueError, match="differ in cards. Give another file"):
        benchmark.merge(write("other", "H100", "nf4"), into)


STORED = sorted((ROOT / "benchmarks" / "results").glob("quantised_memory_*.json"))
# The rest is simulated again by the weekly workflow, as are runs under wider caps than the load's.
EACH_TIME = ("int8, capped to 16 GB", "nf4, half precision", "nf4, QLoRA")
EVERY = bool(os.environ.get("EVERY_MEASUREMENT"))


@pytest.mark.parametrize(
    ("path", "number"),
    [
        pytest.param(path, number, id=f"{path.stem}-{each['load']['name']}")
        for path in STORED
        for number, each in enumerate(json.loads(path.read_text(encoding="utf-8"))["loads"])
        if each["load"]["name"] in EACH_TIME or EVERY
    ],
)
def test_simulated_quantised_weights_take_what_was_measured(path, number):
    results = json.loads(path.read_text(encoding="utf-8"))
    found = results["loads"][number]
    results["loads"] = [found]
    library = "torchao" if found["load"]["weights"].startswith("int") else "bitsandbytes"
    pytest.importorskip(library, reason=f"{library} is not installed")
    if not EVERY:
        for runs in (found["records"], found["load"]["runs"]):
            runs[:] = [each for each in runs if each["cap_bytes"] == found["load"]["cap_bytes"]]
    memory = load_benchmark("memory")
    ((load, measured, simulated),) = memory.simulate(results)
    figures, differences = memory.compare(load, measured, simulated)
    assert differences == []
    if load.weights == "LLM.int8":  # none of whose inputs is assumed to be large: see below
        prompts = [each for each in figures if each.run != "load"]
        less = [each.measured - each.simulated for each in prompts if "allocated" in each.name]
        assert len(less) == 6 and min(less) > 0 and max(less) < 1016 * memory.MIB  # rig.exactness
        figures = [figure for figure in figures if figure.run == "load"]
    assert [figure for figure in figures if not figure.right] == []
    page = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8").splitlines()
    assert [row for row in memory.rows(load, measured, simulated) if row not in page] == []


def stored_loads() -> list[dict]:
    files = (json.loads(path.read_text(encoding="utf-8")) for path in STORED)
    return [each for content in files for each in content["loads"]]


def test_8_bits_take_what_was_measured_where_the_large_numbers_are_known(monkeypatch):
    """How many columns of a product's input had some was read from the allocator's trace."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from torch import int64

    from simgpu import quantised

    results = json.loads(STORED[0].read_text(encoding="utf-8"))
    (found,) = (each for each in results["loads"] if "large_columns" in each)
    counts, name = found["large_columns"]["counts"], found["large_columns"]["run"]
    found["records"] = [each for each in found["records"] if each["run"] in ("load", name)]
    found["load"]["runs"] = [each for each in found["load"]["runs"] if each["name"] == name]
    left = [count for step in counts for count in step]

    def columns_of(large):
        large.any()
        count = left.pop(0) if large.shape[-1] == 13696 else 0  # the input of an MLP's second half
        return large.new_empty(count, dtype=int64)

    monkeypatch.setattr(quantised, "_columns_of", columns_of)
    memory = load_benchmark("memory")
    ((load, measured, simulated),) = memory.simulate(results | {"loads": [found]})
    figures, differences = memory.compare(load, measured, simulated)
    assert differences == [] and {figure.stage for figure in figures} >= {"prefill", "decode"}
    assert [figure for figure in figures if not figure.right] == []
    assert len(left) < len(counts) * len(counts[0])


def test_8_bits_keep_what_says_how_many_columns_had_large_numbers(monkeypatch):
    """An index of 8 bytes for each stays in its layer; with as many in every layer a prompt that
    was not traced takes what it took, but for how much the layers differ."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from torch import int64

    from simgpu import quantised

    results = json.loads(STORED[0].read_text(encoding="utf-8"))
    (found,) = (each for each in results["loads"] if "large_columns" in each)
    name, layers = "batch 2, text 300, 4 new", 8
    found["records"] = [each for each in found["records"] if each["run"] in ("load", name)]
    found["load"]["runs"] = [each for each in found["load"]["runs"] if each["name"] == name]
    memory, counts = load_benchmark("memory"), [0, 0]

    def columns_of(large):
        large.any()
        rows, columns = large.shape
        in_layers = counts[rows < 600] if columns == 13696 else 0
        return large.new_empty(in_layers, dtype=int64)

    def simulated():
        ((_, measured, ours),) = memory.simulate(results | {"loads": [found]})
        of = "allocated_bytes", "peak_allocated_bytes"
        cards = [[stage["memory"][0] for stage in each[1]["stages"]] for each in (measured, ours)]
        return [[one[key] - two[key] for key in of] for one, two in zip(*cards, strict=True)]

    monkeypatch.setattr(quantised, "_columns_of", columns_of)
    (kept, less), (kept_decoding, _) = simulated()
    assert less > 230 * memory.MIB
    # The tower keeps those of the image before; decoding keeps one block of 512 bytes a layer.
    of_tower = kept_decoding - 512 * layers
    counts[0] = (kept - of_tower) // layers // 8
    page = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    assert f"{round(counts[0], -2):,} of 13,696" in page
    (kept, less), _ = simulated()
    assert abs(kept - of_tower) < 512 * layers
    assert 0 < less < 8 * memory.MIB


def test_every_format_was_measured_whole_and_all_but_int4_under_every_cap(benchmark):
    found = cases(each["load"] for each in stored_loads())
    under = {(each, cap) for each in ("bfloat16", "int8", "nf4") for cap in benchmark.CAPS}
    assert found >= under | {("int4", None), ("LLM.int8", None)}
    assert {each["load"]["name"] for each in stored_loads()} >= {"nf4", "nf4, QLoRA"}


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
    assert asdict(now) == row["devices"][0]


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_page_says_how_fast_fused_kernels_were(weights):
    stored = ROOT / "benchmarks" / "results" / "decoding_quantised_h100.json"
    rows = json.loads(stored.read_text(encoding="utf-8"))["rows"]
    speeds = {(row["rung"], row["batch"]): row["tokens_per_second"] for row in rows}
    page = (ROOT / "docs" / "quantising.md").read_text(encoding="utf-8")
    columns = [("step", 1), ("step", 2), ("step", 4), ("fast", 1), ("fast", 4)]
    plain = [speeds[f"{rung} bfloat16", batch] for rung, batch in columns]
    assert f"| bfloat16 | {' | '.join(f'{each:,.1f}' for each in plain)} |" in page
    for name, label, count in ((weights, weights, 5), (f"{weights}, head too", "`keep=[]`", 3)):
        cells = [
            f"{speeds[f'{rung} {name}', batch]:,.1f} ({speeds[f'{rung} {name}', batch] / one:.2f})"
            for (rung, batch), one in zip(columns[:count], plain[:count], strict=True)
        ]
        assert f"{label} | {' | '.join(cells)} |" in page
    slow, quick = (
        next(row["first_token_seconds"] for row in rows if row["rung"] == f"fast {each}")
        for each in (weights, "bfloat16")
    )
    assert f"{slow:.2f} s" in page and f"{quick:.2f} s" in page
