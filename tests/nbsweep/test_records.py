"""``record``: what a notebook leaves for whoever reruns it."""

import pytest

from nbsweep import record
from nbsweep.records import RECORDS_VARIABLE
from nbsweep.store import read_records


class Tensor:
    """As torch's, no number."""


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv(RECORDS_VARIABLE, str(tmp_path / "records.jsonl"))
    return tmp_path / "records.jsonl"


def test_a_figure_is_shown_with_its_label_and_kept_with_its_type(path, capsys):
    given = [
        record("peak on card 0", 14_411_497_472, "bytes", "simulated"),
        record("tokens per second", 287.25, "1/s", "measured on CPU, 2026-11-25"),
        record("fits", True, label="simulated"),
        record("card", "L4", label="cited, data sheet"),
        record("layers", 40, label="arithmetic"),
    ]
    assert capsys.readouterr().out.splitlines() == [
        "peak on card 0: 13.42 GiB  (simulated)",
        "tokens per second: 287.2 1/s  (measured on CPU, 2026-11-25)",
        "fits: True  (simulated)",
        "card: L4  (cited, data sheet)",
        "layers: 40  (arithmetic)",
    ]
    kept = read_records(path)
    assert kept == given
    assert [type(each.value) for each in kept] == [int, float, bool, str, int]


def test_without_a_file_a_figure_is_only_shown(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv(RECORDS_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    record("a", 1)
    assert capsys.readouterr().out == "a: 1  (simulated)\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((" ", 1), ValueError, "expected a few words"),
        (("a", None), TypeError, "a is a NoneType; expected a number"),
        (("a", Tensor()), TypeError, r"Take .item\(\) of a tensor"),
        (("a", [1, 2]), TypeError, "record its parts one by one"),
        (("a", float("nan")), ValueError, "a is nan; expected a finite number"),
        (
            ("a", 1, "", "guessed"),
            ValueError,
            "label is 'guessed'; expected it to begin with one of simulated",
        ),
    ],
)
def test_what_is_no_figure_is_refused_and_nothing_is_kept(path, arguments, error, text):
    with pytest.raises(error, match=text):
        record(*arguments)
    assert not path.exists()


@pytest.mark.parametrize("mark", ["\x85", "\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\r", "\r\n"])
def test_a_text_with_any_line_separator_is_kept_as_it_is(path, mark):
    given = [record(f"answer{mark}", f"one{mark}two"), record("score", 1)]
    assert read_records(path) == given
