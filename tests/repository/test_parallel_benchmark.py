"""benchmarks/parallel.py: its parts do not take each other down, and what they say is compared."""

import runpy
from pathlib import Path

import pytest
import torch
from benchmark_program import load_benchmark

ROOT = Path(__file__).parents[2]
PROGRAM = """
import pathlib, sys, time
part, folder = sys.argv[2], pathlib.Path(sys.argv[3])
if part == "late":
    time.sleep(60)
if part == "beside":
    while not (folder / "other.json").exists():  # which runs at the same time
        time.sleep(0.01)
(folder / f"{part}.json").write_text("{}")
if part == "broken":
    sys.exit("this part is broken")
"""


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield load_benchmark("parallel")


def test_a_part_that_fails_or_takes_too_long_is_told_and_the_next_runs(tmp_path, benchmark):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    part = benchmark.Part
    parts = {
        "broken": part(None, 30),
        "late": part(None, 1),
        "beside": part(None, 30, alone=False),
        "other": part(None, 30, alone=False),
        "last": part(None, 30),
    }
    stale = tmp_path / "late.json"
    stale.write_text("of an earlier run")
    ended = list(benchmark.run_parts(parts, program, [tmp_path], tmp_path, 2, {}))
    assert ended == list(parts)
    assert {file.stem for file in tmp_path.glob("*.failed")} == {"broken", "late"}
    assert not stale.exists()
    results = {"rows": []}
    for name in parts:
        benchmark._take(name, tmp_path, results)
    assert "this part is broken" in results["failed"]["broken"]
    assert set(results["failed"]) == {"broken", "late"}


def test_answers_are_compared_to_their_first_difference_and_logits_in_norm(benchmark):
    right = torch.eye(2, 4)
    alone = {"float32": right, "bfloat16": right * 1.5, "fused": right, "answer": [1, 2, 3, 4]}
    shared = {"fused": right * 1.25, "answer": [1, 2, 9, 4]}
    for each in (alone, shared):
        each["answer"] = torch.tensor(each["answer"])
    found = benchmark._compared(shared, alone)
    assert found["answers"] == {"new_tokens": 4, "first_that_are_as_one_cards": 2}
    distance = found["distance_from_float32"]
    assert (distance["tensor_parallel"], distance["bfloat16"]) == (0.25, 0.5)
    assert distance["same_tokens"] == distance["tokens"] == 2


def test_a_limit_is_that_of_all_cards_together(benchmark):
    results = {"rows": [], "bytes": {"weights": 900, "cache_per_position": 1}}
    results["limit"] = {"copy_bytes_per_second": 8000.0, "of_each_card": [4000.0, 4000.0]}
    benchmark._row(results, "tensor step", 1, 100, 6.0)
    (row,) = results["rows"]
    assert (row["cards"], row["share_of_limit"]) == (2, 0.75)


def test_the_page_tells_what_is_there_and_no_more():
    together = runpy.run_path(str(ROOT / "tools" / "speed.py"))["_together"]
    row = {"rung": "tensor step", "cards": 2, "batch": 1, "context": 1700}
    row |= {"tokens_per_second": 378.8, "share_of_limit": 0.788}
    limit = {"copy_bytes_per_second": 8.4e12, "of_each_card": [4.2e12, 4.2e12]}
    results = {"rows": [row], "limit": limit, "measured_on": "a card"}
    page = "\n".join(together(results))
    assert "| a fused step of it alone | 1 | 1,700 | 378.8 | 78.8% |" in page
    assert "Logits" not in page and "Loading" not in page
    results["load_seconds_of_ranks"] = [2.0, 3.0]
    assert "Loading" not in "\n".join(together(results))  # with nothing to compare it with
    results["load_seconds_of_one_card"] = 6.0
    assert "Loading takes 3.0 s a rank, 50% of the 6.0 s of one card" in "\n".join(
        together(results)
    )
