"""The benchmark of the service runs, here on a CPU with random weights of a small model."""

import json

import pytest
from benchmark_program import ROOT, load_benchmark

from glm4v_nb.miniature import CHECKPOINT
from glm4v_nb.model import GLM4VConfig


def test_the_benchmark_counts_every_answer_of_every_user_with_rows_and_without(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = load_benchmark("serving")
    # In place of the full size.
    monkeypatch.setattr(
        benchmark, "official_config", lambda: GLM4VConfig.from_pretrained(CHECKPOINT)
    )
    words = ["--output", str(tmp_path / "out.json"), "--users", "1", "3", "--questions", "2"]
    words += ["--new-tokens", "5", "--dtype", "float32"]
    benchmark.main(words)
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["provenance"]["weights"] == "random"
    found = [(row["method"], row["users"], row["tokens"]) for row in results["rows"]]
    assert found == [
        (method, users, users * 2 * 5) for method in ("8 rows", "one by one") for users in (1, 3)
    ]
    for row in results["rows"]:
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert 0 < row["first_token_seconds_median"] <= row["first_token_seconds_most"]
