"""docs/speed.md says what was measured, and what was measured reaches what is promised."""

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows():
    file = ROOT / "benchmarks" / "results" / "decoding_h100.json"
    found = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return {(row["rung"], row["batch"], row["context"]): row for row in found}


def test_the_page_is_what_the_tool_writes_from_the_stored_results():
    written = runpy.run_path(str(ROOT / "tools" / "speed.py"))["page"]()
    assert (ROOT / "docs" / "speed.md").read_text(encoding="utf-8") == written


def test_fast_answers_come_at_93_percent_of_the_limit_and_at_88_with_a_long_context(rows):
    assert rows["fast", 1, 1700]["share_of_limit"] >= 0.93
    assert rows["fast", 1, 8000]["share_of_limit"] >= 0.88


def test_four_prompts_at_a_time_give_3_6_times_the_tokens_of_one(rows):
    one, four = (rows["fast", batch, 1700]["tokens_per_second"] for batch in (1, 4))
    assert four >= 3.6 * one


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_front_page_says_the_speed_that_was_measured(rows, name):
    text = (ROOT / name).read_text(encoding="utf-8")
    fast = rows["fast", 1, 1700]
    assert re.search(rf"\b{fast['tokens_per_second']:.0f} (tokens a second|个词元)", text)
    assert re.search(rf"\b{fast['share_of_limit']:.0%}".replace("%", " %"), text)
    eager = rows["eager", 1, 1700]["tokens_per_second"]
    assert re.search(rf"\b{eager:.0f} (there|个)", text)
