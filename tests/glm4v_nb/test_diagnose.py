"""``diagnose`` and the notebook behind it: messages that users posted find their case."""

import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import nbformat
import pytest

from glm4v_nb.diagnose import CASES, NOTEBOOK, diagnose

MESSAGES = tomllib.loads(
    Path(__file__).with_name("failure_messages.toml").read_text(encoding="utf-8")
)["message"]


def numbers(message) -> list[int]:
    return [int(case.heading.split()[0]) for case in diagnose(message).cases]


@pytest.mark.parametrize("message", MESSAGES, ids=[one["text"][:60] for one in MESSAGES])
def test_a_message_finds_its_cases_in_order_and_an_unrelated_one_none(message):
    assert numbers(message["text"]) == message["cases"], message["from"]


def test_every_case_is_tried_with_three_messages_and_ten_are_of_no_case():
    counts = Counter(number for message in MESSAGES for number in message["cases"] or [None])
    assert len(CASES) >= 14
    assert all(counts[number] >= 3 for number in range(1, len(CASES) + 1)), counts
    assert counts[None] >= 10


def test_colours_line_breaks_and_a_whole_traceback_are_read():
    coloured = (
        "\x1b[0;31m---------\x1b[0m\n\x1b[0;31mRuntimeError\x1b[0m: Input type (c10::BFloat16)"
        " and\n  bias type (c10::Half)\x1b[0m should be the same\n"
    )
    assert numbers(coloured) == [9]
    assert numbers(f"推理时报错：\n{coloured}请问怎么解决？") == [9]


def test_an_exception_is_taken_as_it_is():
    assert numbers(AttributeError("'DataParallel' object has no attribute 'generate'")) == [4]
    with pytest.raises(TypeError, match="diagnose takes.*not int.*Paste the text between quotes"):
        diagnose(3)


def test_what_is_shown_says_why_and_what_to_do_and_where_to_read_it():
    shown = repr(diagnose("RuntimeError: CUDA error: invalid device ordinal"))
    assert shown.startswith("Case 7 CUDA_VISIBLE_DEVICES set too late\nCause: ")
    assert "\nCure: " in shown
    assert shown.endswith(f"See {NOTEBOOK}#7-CUDA_VISIBLE_DEVICES-set-too-late")
    assert max(map(len, shown.splitlines())) <= 100


def test_what_is_unknown_is_called_so():
    shown = repr(diagnose("KeyError: 'glm4v_moe'"))
    assert shown.startswith(f"Not one of the {len(CASES)} cases")
    assert "glm4v-nb doctor --report" in shown


def test_every_case_has_a_section_in_the_notebook_and_every_section_a_case():
    notebook = nbformat.read(Path(__file__).parents[2] / NOTEBOOK, as_version=4)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert re.findall(r"^## (\d+ .*)$", prose, re.MULTILINE) == [case.heading for case in CASES]


def test_the_command_reads_a_message_from_a_pipe():
    done = subprocess.run(
        [sys.executable, "-m", "glm4v_nb", "diagnose"],
        input="RuntimeError: Input type (c10::BFloat16) and bias type (c10::Half)",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Case 9 BFloat16 meets Half")
