"""nbval executes every registered notebook in this same session; here are the rules for what is
stored in them."""

import configparser
import re
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
from matplotlib import colors
from notebook_rules.stored import check_notebook

from nbsweep.plan import plan_notebook
from nbsweep.registry import load_registry
from simgpu.plots import COLOURS

SANITIZE = Path(__file__).parent / "sanitize.cfg"
ROOT = Path(__file__).parents[2]
REGISTRIES = [
    load_registry(folder / "registry.toml")
    for folder in (ROOT / "notebooks", ROOT / "sweeps" / "targets")
]
STORED = [
    (registry.folder / entry.file, entry) for registry in REGISTRIES for entry in registry.notebook
]


def sanitized(text):
    config = configparser.RawConfigParser()
    config.read(SANITIZE, encoding="utf-8")
    for section in config.sections():
        text = re.sub(config.get(section, "regex"), config.get(section, "replace"), text)
    return text


def test_the_registries_list_every_notebook_and_every_listed_one_exists():
    stored = sorted(ROOT.glob("notebooks/*.ipynb")) + sorted(ROOT.glob("sweeps/*/*.ipynb"))
    assert [path for path, _ in STORED] == stored


@pytest.mark.parametrize(("path", "entry"), STORED, ids=[path.stem for path, _ in STORED])
def test_a_stored_notebook_keeps_every_rule(path, entry):
    assert [str(finding) for finding in check_notebook(path, entry)] == []


@pytest.mark.parametrize("path", [path for path, _ in STORED], ids=lambda path: path.stem)
def test_no_link_or_picture_of_a_notebook_leads_nowhere(path):
    cells = nbformat.read(path, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for link in re.findall(r"\]\(((?!http)[^)#]+)", text):
        assert (path.parent / link).exists(), link


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_a_lesson_that_shows_measured_figures_says_of_which_weights(path):
    cells = nbformat.read(path, as_version=4).cells
    text = " ".join(" ".join(cell.source.split()) for cell in cells if cell.cell_type == "markdown")
    if re.search(r"\b[Mm]easured\b", text):
        assert re.search(r"random weights|weights were random|miniature|without any model", text)


def is_quiet(colour: str) -> bool:
    """Whether a colour is a grey, or so light that it only is a ground."""
    channels = colors.to_rgb(colour)
    return max(channels) - min(channels) < 0.01 or min(channels) > 0.85


@pytest.mark.parametrize(
    "path", sorted((ROOT / "notebooks").rglob("*.svg")), ids=lambda path: path.stem
)
def test_a_drawing_has_a_title_and_a_description_and_the_pictures_colours(path):
    drawing = ElementTree.parse(path).getroot()
    named = {child.get("id"): child.text for child in drawing}
    assert drawing.get("role") == "img"
    words = [named[name] for name in drawing.get("aria-labelledby").split()]
    assert len(words) == 2 and all(words)
    colours = {element.get("fill") for element in drawing.iter()} - {None, "none"}
    loud = {colour for colour in colours if not is_quiet(colour)}
    assert loud <= set(COLOURS.values()), "told apart by the colour-blind"


def test_at_least_a_hundred_cells_are_compared_with_their_stored_output():
    """A cell whose figures are the same everywhere is tagged so; who untags many, says why."""
    cells = [cell for path, _ in STORED for cell in nbformat.read(path, as_version=4).cells]
    marked = [cell for cell in cells if "nbval-check-output" in cell.metadata.get("tags", [])]
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


@pytest.mark.parametrize("number", ["01", "03", "14"])
def test_the_lessons_on_placement_take_the_cards_of_a_hosted_notebook_with_their_data_type(number):
    given = {"card": "T4", "count": "2", "dtype": "float16"}
    (spec,) = plan_notebook(number, given).specs
    assert {name: str(spec.parameters[name]) for name in given} == given
