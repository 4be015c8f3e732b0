"""What is told of an error: its one line, what groups it with others, and that memory ran out."""

import traceback

import pytest

from nbsweep.errors import explain, one_line
from nbsweep.store import Outcome

FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 22.03 GiB of"
    " which 1.00 GiB is free. Including non-PyTorch memory, this process has 21.03 GiB memory in"
    " use. Of the allocated memory 20.00 GiB is allocated by PyTorch, and 0 bytes is reserved by"
    " PyTorch but unallocated."
)


class OutOfMemoryError(RuntimeError):
    """As torch's."""


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def told(error: Exception) -> dict:
    text = "".join(traceback.format_exception(raised(error)))
    text = f"cell\n------\n\n----- stderr -----\n{text}------------------\n\n"  # of nbclient
    return explain(type(error).__name__, str(error), text)


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("", "E"),
        ("\n\n", "E"),
        ("\nthe reason", "E: the reason"),
        ("\r\n\t the  reason\r\nmore", "E: the reason"),
        ("\n=====\n-----\nthe reason", "E: the reason"),
        ("\u200b\nthe reason", "E: the reason"),
        ("\x1b[31m\nthe reason\x1b[0m", "E: the reason"),
        ("\u3000\xa0\n原因", "E: 原因"),
        ("...", "E: ..."),
    ],
)
def test_the_line_of_an_error_is_the_first_that_has_words(message, line):
    assert one_line("E", message) == line


def test_a_line_of_megabytes_is_cut_and_says_so():
    line = one_line("E", "begin " + "x" * 5_000_000 + " end")
    assert 990 < len(line) <= 1_000
    assert line.startswith("E: begin xx") and line.endswith("xx end")
    assert "… [shortened from 5,000,013 characters; executed.ipynb has all] …" in line


def test_texts_of_an_outcome_are_cut_once_and_read_back_as_they_are():
    outcome = Outcome(
        status="failed", started="now", seconds=1, error="e" * 9_999, traceback="t" * 99_999
    )
    assert 1_990 < len(outcome.error) <= 2_000 and 19_990 < len(outcome.traceback) <= 20_000
    assert Outcome.model_validate_json(outcome.model_dump_json()) == outcome


def test_a_group_is_told_by_its_leaves_and_grouped_by_their_kinds():
    def group(number):
        inner = ExceptionGroup("inner\nof two lines", [KeyError("b"), RuntimeError("\n\nlate")])
        return ExceptionGroup("many", [ValueError(f"bad {number}"), inner, ValueError("bad 9")])

    first, second = told(group(1)), told(group(2))
    assert first["status"] == "failed"
    assert first["error"] == (
        "ExceptionGroup: many (3 sub-exceptions): ValueError: bad 1; KeyError: 'b';"
        " RuntimeError: late; ValueError: bad 9"
    )
    assert first["signature"] == second["signature"]
    assert (
        first["signature"] == "ExceptionGroup of KeyError: …; RuntimeError: late; ValueError: bad #"
    )
    other = told(ExceptionGroup("many", [KeyError("b")]))
    assert other["signature"] == "ExceptionGroup of KeyError: …"


def test_a_leaf_is_told_by_its_own_type_and_not_by_what_caused_it():
    try:
        try:
            {}["a"]
        except KeyError as error:
            raise ValueError("Odd: message\nFoo: bar") from error
    except ValueError as error:
        error.add_note("Note: one")
        leaf = error
    assert told(ExceptionGroup("g", [leaf]))["error"] == (
        "ExceptionGroup: g (1 sub-exception): ValueError: Odd: message"
    )


def test_what_python_does_not_print_of_a_group_is_said_to_be_missing():
    wide = told(ExceptionGroup("g", [ValueError(number) for number in range(17)]))
    assert wide["error"].endswith("ValueError: 13; ValueError: 14; and 2 more exceptions")
    deep = ValueError("a")
    for _ in range(11):
        deep = ExceptionGroup("g", [deep])
    assert told(deep)["error"].endswith("(1 sub-exception): ... (max_group_depth is 10)")


def test_a_leaf_without_a_message_is_told_by_its_type():
    group = ExceptionGroup("g", [ExceptionGroup("h", [ValueError()]), RuntimeError()])
    assert told(group)["error"].endswith("(2 sub-exceptions): ValueError; RuntimeError")


def test_running_out_of_memory_in_a_group_is_running_out_of_memory():
    full = OutOfMemoryError(FULL)
    full.add_note('in the stage "prefill"')
    group = ExceptionGroup("g", [ValueError("a"), ExceptionGroup("h", [raised(full)])])
    found = told(group)
    assert (found["status"], found["signature"]) == ("oom", "out of memory in prefill")
    assert (found["oom"].device, found["oom"].phase) == (1, "prefill")
    assert "ValueError: a; " in found["error"] and "OutOfMemoryError: CUDA" in found["error"]


def test_an_error_whose_message_only_looks_like_a_groups_is_its_own():
    found = told(ValueError("I have (2 sub-exceptions)"))
    assert found["error"] == "ValueError: I have (2 sub-exceptions)"
    assert found["signature"] == "ValueError: I have (# sub-exceptions)"
