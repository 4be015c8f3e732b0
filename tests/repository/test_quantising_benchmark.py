"""The program that measures quantised weights on a GPU, on simulated cards with the miniature."""

import copy
import importlib.util
import json

import pytest
from benchmark_program import ROOT, load_benchmark

from glm4v_nb.miniature import CHECKPOINT
from simgpu import Rig

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")  # as where it is run
        return load_benchmark("quantising")


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
