"""The glossary's terms: each once, in both languages, and used by the notebook that it names."""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TABLE.splitlines()
    if line.startswith("| ") and "](" in line
]


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_the_notebook_that_explains_a_term_exists_and_uses_it(row):
    term, chinese, meaning, meaning_chinese, place = row
    number, link = re.fullmatch(r"\[(\d\d)\]\((.+)\)", place).groups()
    path = (ROOT / "docs" / link).resolve()
    assert path.is_file() and path.name.startswith(f"{number}_")
    cells = nbformat.read(path, as_version=4).cells
    text = " ".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert re.search(rf"\b{term}", text, re.IGNORECASE), f"{path.name} has no {term!r}"
    assert meaning and re.search(r"[\u4e00-\u9fff]", meaning_chinese)
    assert chinese in ("GPU", "LoRA") or re.search(r"[\u4e00-\u9fff]", chinese)


def test_the_words_that_everything_is_said_with_are_there_once():
    terms = [row[0] for row in ROWS]
    assert len(terms) == len(set(terms)) >= 30
    assert {
        "card", "GPU", "device", "stage", "sample", "image", "prefill", "decode", "KV cache",
        "segment", "block", "reserved", "allocated",
    } <= set(terms)  # fmt: skip
