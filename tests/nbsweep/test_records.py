"""``record``: what a notebook leaves for whoever reruns it."""

import enum
import json

import numpy as np
import pytest

from nbsweep import record
from nbsweep.records import RECORDS_VARIABLE
from nbsweep.store import read_records


class Tensor:
    """As torch's, no number."""


class Size(enum.IntEnum):
    """An int with a name."""

    SMALL = 3


class Card(enum.StrEnum):
    """A text with a name."""

    SMALL = "L4"


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
        (("a", float("-inf")), ValueError, "a is -inf; expected a finite number"),
        (("a", np.float32("inf")), ValueError, "a is inf; expected a finite number"),
        (("a", 10**5000), ValueError, "a is beyond the largest float; expected a finite number"),
        (("a", 1, None), TypeError, "unit of a is None; expected a text such as 'bytes'"),
        (("a", 1, "", None), ValueError, "label is None; expected it to begin with one of"),
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


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (np.float64(1.5), 1.5),
        (np.float32(0.5), 0.5),
        (np.float16(0.5), 0.5),
        (np.longdouble(0.5), 0.5),
        (np.int64(-3), -3),
        (np.uint8(200), 200),
        (np.bool_(True), True),
        (np.str_("L4"), "L4"),
        (np.array(7), 7),
        (np.array(0.25), 0.25),
        (np.array(False), False),
        (np.arange(3).max(), 2),
        (np.arange(3).mean(), 1.0),
        (Size.SMALL, 3),
        (Card.SMALL, "L4"),
    ],
)
def test_a_numpy_scalar_is_kept_as_its_python_value(path, value, kept):
    given = record("a", value)
    (found,) = read_records(path)
    assert (found.value, type(found.value)) == (kept, type(kept))
    assert (given.value, type(given.value)) == (kept, type(kept))


@pytest.mark.parametrize(
    "value",
    [
        np.array([1]), np.array([]), np.ma.masked, np.datetime64("2026-01-01"), np.complex64(1),
        np.bytes_(b"a"), np.array(None),
    ],
)  # fmt: skip
def test_what_numpy_has_beside_numbers_and_texts_is_refused(path, value):
    with pytest.raises(TypeError, match="expected a number, a text, or True or False"):
        record("a", value)
    assert not path.exists()


def test_a_name_recorded_again_is_kept_in_its_order(path):
    given = [record("loss", 3.0), record("loss", 2.0), record("loss", 2.0)]
    assert read_records(path) == given


def test_half_of_a_character_becomes_the_sign_for_one_that_is_missing(path):
    record("name \udcff", "a\ud83d", "\udcff/s", "cited \ud800")
    record("whole", "\ud83d\ude00")  # two halves, as JavaScript has them
    first, second = read_records(path)
    missing = "\N{REPLACEMENT CHARACTER}"
    assert (first.name, first.value) == (f"name {missing}", f"a{missing}")
    assert (first.unit, first.label) == (f"{missing}/s", f"cited {missing}")
    assert second.value == "\N{GRINNING FACE}"
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


@pytest.mark.parametrize("mark", ["\x85", "\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\r", "\r\n"])
def test_a_text_with_any_line_separator_is_kept_as_it_is(path, mark):
    given = [record(f"answer{mark}", f"one{mark}two"), record("score", 1)]
    assert read_records(path) == given
