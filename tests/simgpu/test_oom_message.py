"""Reading PyTorch's out-of-memory message."""

import pytest

from simgpu.oom import explain, parse_out_of_memory

# Recorded on one H100 80GB HBM3 capped to 24e9 bytes, torch 2.11.
REAL = (
    "CUDA out of memory. Tried to allocate 108.00 MiB. GPU 0 has a total capacity of 79.18 GiB of"
    " which 56.23 GiB is free. Including non-PyTorch memory, this process has 22.94 GiB memory in"
    " use. 22.35 GiB allowed; Of the allocated memory 22.02 GiB is allocated by PyTorch, and 332.87"
    " MiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is large try"
    " setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)


def test_every_figure_of_a_real_message_is_read_in_bytes():
    message = parse_out_of_memory(REAL)
    assert message.device == 0
    assert message.tried_bytes == 108 * 2**20
    assert message.capacity_bytes == round(79.18 * 2**30)
    assert message.free_bytes == round(56.23 * 2**30)
    assert message.process_bytes == round(22.94 * 2**30)
    assert message.allocated_bytes == round(22.02 * 2**30)
    assert message.unallocated_bytes == round(332.87 * 2**20)


def test_the_context_is_what_the_other_figures_leave():
    # 22.94 - 22.02 GiB - 332.87 MiB, each good to two decimals of a GiB.
    assert parse_out_of_memory(REAL).outside_bytes == pytest.approx(0.6 * 2**30, abs=0.02 * 2**30)


def test_a_request_larger_than_the_free_memory_is_short_by_the_difference():
    text = REAL.replace("22.35 GiB allowed; ", "")
    assert parse_out_of_memory(text).short_bytes == 0
    text = text.replace("108.00 MiB", "60.00 GiB")
    assert parse_out_of_memory(text).short_bytes == round(60 * 2**30) - round(56.23 * 2**30)


def test_under_a_cap_the_request_is_short_by_what_the_process_may_not_have():
    message = parse_out_of_memory(REAL)
    assert message.allowed_bytes == round(22.35 * 2**30)
    room = message.allowed_bytes - message.allocated_bytes - message.unallocated_bytes
    assert message.short_bytes == 108 * 2**20 - room == pytest.approx(103 * 2**20, abs=2**20)


def test_an_exception_is_read_like_its_text():
    assert parse_out_of_memory(RuntimeError(REAL)) == parse_out_of_memory(REAL)


def test_another_error_is_refused_with_its_beginning():
    with pytest.raises(ValueError, match="not an out-of-memory message.*device-side assert"):
        parse_out_of_memory("CUDA error: device-side assert triggered")


CODE = "error.add_note(f'in the stage \"{name}\"')\nraise error\n"
NOTES = '\nin the stage "prefill"\nin the stage "all"'


def test_an_error_and_its_traceback_tell_card_stage_and_what_was_missing():
    found = explain(f"OutOfMemoryError: {REAL}", f"{CODE}OutOfMemoryError: {REAL}{NOTES}")
    short = parse_out_of_memory(REAL).short_bytes
    assert found == {
        "device": 0,
        "phase": "prefill",
        "short_bytes": short,
        "needs_bytes": round(22.94 * 2**30) + 108 * 2**20,
    }
    assert explain(REAL) == found | {"phase": None}


def test_the_stage_is_the_note_of_the_innermost_one_and_no_line_of_code():
    nothing = {"device": None, "phase": None, "short_bytes": None, "needs_bytes": None}
    assert explain("torch.OutOfMemoryError: full", CODE) == nothing
    assert explain("torch.OutOfMemoryError: out of memory", f"{CODE}out of memory{NOTES}") == (
        nothing | {"phase": "prefill"}
    )


@pytest.mark.parametrize("error", ["", "ValueError: OutOfMemoryError is no more", "CUDA error"])
def test_another_error_is_not_explained(error):
    assert explain(error, CODE + NOTES) is None
