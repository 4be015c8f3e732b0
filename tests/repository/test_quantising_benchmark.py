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


def test_the_page_says_what_was_measured():
    stored = ROOT / "benchmarks" / "results" / "miniature_quantised.json"
    found = json.loads(stored.read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "quantising.md").read_text(encoding="utf-8")
    assert f"{found['questions']} held-out questions" in page
    for name, version in found["versions"].items():
        assert f"{name} {version}" in " ".join(page.split())
    rows = {**found["formats"], **found["parts"]}
    assert len(rows) == len(found["formats"]) + len(found["parts"]) == 25
    for name, row in rows.items():
        figures = (row[key] for key in ("right", "as_bfloat16", "logits_off"))
        assert f"| {name} | {' | '.join(f'{each:.2%}' for each in figures)} |" in page
