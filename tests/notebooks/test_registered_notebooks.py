"""nbval executes every registered notebook in this same session; here are the rules for what is
stored in them."""

import configparser
import re
from pathlib import Path

import nbformat
import pytest

from nbsweep.registry import DEFAULT_REGISTRY, load_registry
from nbsweep.rules import check_notebook

SANITIZE = Path(__file__).parent / "sanitize.cfg"
NOTEBOOKS = sorted(DEFAULT_REGISTRY.parent.glob("*.ipynb"))


def sanitized(text):
    config = configparser.RawConfigParser()
    config.read(SANITIZE, encoding="utf-8")
    for section in config.sections():
        text = re.sub(config.get(section, "regex"), config.get(section, "replace"), text)
    return text


def test_the_registry_lists_every_notebook_and_every_listed_one_exists():
    registry = load_registry()
    assert [entry.file for entry in registry.notebook] == [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize(
    "entry", load_registry().notebook, ids=lambda entry: entry.file.removesuffix(".ipynb")
)
def test_a_stored_notebook_keeps_every_rule(entry):
    assert [
        str(finding) for finding in check_notebook(DEFAULT_REGISTRY.parent / entry.file, entry)
    ] == []


def test_at_least_a_hundred_cells_are_compared_with_their_stored_output():
    """A cell whose figures are the same everywhere is marked so; who unmarks many, says why."""
    cells = [cell for path in NOTEBOOKS for cell in nbformat.read(path, as_version=4).cells]
    marked = [
        cell
        for cell in cells
        if "nbval-check-output" in cell.metadata.get("tags", [])
        or "# NBVAL_CHECK_OUTPUT" in cell.source
    ]
    assert len(marked) >= 100
    assert all(cell.outputs for cell in marked), "a comparison of nothing with nothing"


def test_times_and_addresses_are_sanitized():
    assert (
        sanitized("load 3.21 s, step 12 ms, 31.5 tokens/s at 12:30:01, <a 0x7f00deadbeef>")
        == "load TIME, step TIME, RATE at CLOCK, <a ADDRESS>"
    )


def test_byte_counts_and_versions_are_not_sanitized():
    text = (
        "27,812,904,960 bytes, 25.90 GiB of 22.03 GiB, 2 cards, 40 layers, torch 2.13.0, 1602"
        " tokens"
    )
    assert sanitized(text) == text
