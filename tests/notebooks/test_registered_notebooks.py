"""nbval executes every registered notebook in this same session; here is what nbval does not look at."""

import configparser
import re
from pathlib import Path

import nbformat
import pytest

from glm4v_nb.experiment.registry import DEFAULT_REGISTRY, load_registry

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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_under_300_kilobytes(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    assert path.stat().st_size < 300_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_stores_no_error_no_stderr_and_no_widget_state(path):
    notebook = nbformat.read(path, as_version=4)
    assert "widgets" not in notebook.metadata
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr" or "stderr" in cell.metadata.get("tags", []), cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_stored_outputs_and_no_path_of_one_machine(path):
    assert any(cell.get("outputs") for cell in nbformat.read(path, as_version=4).cells)
    assert not re.search(r"/(home|root|Users|tmp|work)/\w", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_leaves_the_cell_with_an_error_to_a_caught_exception(path):
    """papermill stops at a cell tagged raises-exception although nbval accepts it."""
    tags = {tag for cell in nbformat.read(path, as_version=4).cells for tag in cell.metadata.get("tags", [])}
    assert "raises-exception" not in tags


def test_times_and_addresses_are_sanitized():
    assert sanitized("load 3.21 s, step 12 ms, 31.5 tokens/s at 12:30:01, <a 0x7f00deadbeef>") == (
        "load TIME, step TIME, RATE at CLOCK, <a ADDRESS>"
    )


def test_byte_counts_and_versions_are_not_sanitized():
    text = "27,812,904,960 bytes, 25.90 GiB of 22.03 GiB, 2 cards, 40 layers, torch 2.13.0, 1602 tokens"
    assert sanitized(text) == text
