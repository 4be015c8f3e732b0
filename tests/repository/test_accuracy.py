"""docs/accuracy.md is what tools/accuracy.py writes, and what it and the README claim is stored."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("accuracy", ROOT / "tools" / "accuracy.py")
accuracy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(accuracy)

MIB = 2**20
CARDS = accuracy.measured_files("memory")


@pytest.fixture(scope="module")
def compared():
    """Of every file of measurements: figures, differences, rows of the table."""
    return [accuracy.compared(path) for path in CARDS]


@pytest.mark.parametrize("path", accuracy.PAGES, ids=lambda path: path.parent.name)
def test_a_page_is_what_the_command_writes(path):
    assert accuracy.page(path) == path.read_text(encoding="utf-8"), "run python tools/accuracy.py"


def test_a_changed_figure_changes_the_page(tmp_path, monkeypatch):
    results = Path(shutil.copytree(accuracy.RESULTS, tmp_path / "results"))
    stored = results / "simulated" / CARDS[0].name
    text = stored.read_text(encoding="utf-8")
    peaks = re.findall(r'"peak_allocated_bytes": (\d+)', text)
    highest = max(peaks, key=int)
    stored.write_text(text.replace(highest, str(int(highest) + 3 * MIB)), encoding="utf-8")
    monkeypatch.setattr(accuracy, "RESULTS", results)
    monkeypatch.setattr(accuracy, "SIMULATED", results / "simulated")
    assert accuracy.page() != accuracy.PAGE.read_text(encoding="utf-8")


def test_every_measurement_has_its_simulated_figures_and_all_are_right(compared):
    for path, (figures, differences, rows) in zip(CARDS, compared, strict=True):
        assert differences == [] and [figure for figure in figures if not figure.right] == []
        records = [each["records"] for each in accuracy.read(path)["loads"]]
        assert len(rows) == sum(map(len, records))
    for path in accuracy.measured_files("host_memory"):
        cases = {each["case"] for each in accuracy.read(accuracy.SIMULATED / path.name)["figures"]}
        assert cases >= {
            accuracy.host_memory.read_case(each["case"]).name
            for each in accuracy.read(path)["cases"]
            if "disk" not in str(each["case"])
        }


def test_the_claim_of_the_readme_is_what_was_measured(compared):
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    ((runs, others),) = re.findall(
        r"Of (\d+) runs measured on one and two H100 and two and four H200, with random weights,"
        r" all ended as simulated, and every peak of allocated memory but (\d+) was within 1 MiB",
        text,
    )
    chinese = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
    assert f"实测了 {runs} 次运行" in chinese and f"除 {others} 个外" in chinese
    rows = [row for _, _, rows in compared for row in rows]
    assert int(runs) == sum("| load |" not in row for row in rows)
    apart = [
        abs(figure.simulated - figure.measured)
        for figures, _, _ in compared
        for figure in figures
        if figure.name == "peak_allocated_bytes"
    ]
    assert sum(distance > MIB for distance in apart) == int(others)
    assert max(apart) <= 5 * MIB
