"""The prompting panel without a browser: its states, what it keeps, and what it escapes."""

import functools
import gc
import io
import threading
import time
import weakref
from datetime import datetime

import ipywidgets
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM
from waiting import until

from glm4v_nb.inference import load
from glm4v_nb.miniature import CHECKPOINT
from glm4v_nb.widgets import PromptPanel, html
from glm4v_nb.workload import Workload, make_prompt, prefill
from simgpu import Rig
from tools.miniature.scenes import encode

OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has a total capacity of 22.03 GiB of"
    " which 1.30 GiB is free. Including non-PyTorch memory, this process has 20.73 GiB memory in"
    " use. Of the allocated memory 19.00 GiB is allocated by PyTorch, and 1.50 GiB is reserved by"
    " PyTorch but unallocated."
)


@pytest.fixture(scope="module")
def loaded():
    return load(CHECKPOINT)


@pytest.fixture
def panel(loaded):
    return PromptPanel(*loaded)


@pytest.fixture
def endless(loaded, monkeypatch):
    monkeypatch.setattr(loaded[0].generation_config, "eos_token_id", None)


def ask(panel, text="How many crosses are there?", seconds=60):
    panel.question.value = text
    panel.ask()
    assert panel.wait(seconds)


def enabled(panel) -> set[str]:
    names = (
        "ask_button",
        "stop_button",
        "clear_button",
        "sample",
        "upload",
        "max_tokens",
        "temperature",
        "top_p",
    )
    return {name for name in names if not getattr(panel, name).disabled}


def fails_with(panel, monkeypatch, error):
    original = panel.model.forward

    @functools.wraps(original)
    def forward(*args, **kwargs):
        raise error

    monkeypatch.setattr(panel.model, "forward", forward)


def hangs(panel, monkeypatch) -> threading.Event:
    """Every forward pass waits for the event that is returned."""
    original, released = panel.model.forward, threading.Event()

    @functools.wraps(original)
    def forward(*args, **kwargs):
        released.wait(30)
        return original(*args, **kwargs)

    monkeypatch.setattr(panel.model, "forward", forward)
    return released


def uploaded(panel, name, content):
    panel.upload.value = (
        {
            "name": name,
            "type": "image/png",
            "size": len(content),
            "content": memoryview(content),
            "last_modified": datetime.now(),
        },
    )


def test_an_answer_is_shown_kept_and_leaves_the_panel_idle(panel):
    ask(panel)
    assert panel.state == "idle"
    assert panel.history[-1] == {"role": "assistant", "content": "4"}
    assert ">4<" in panel.conversation.value
    assert panel.question.value == ""
    assert "stop_button" not in enabled(panel) and "ask_button" in enabled(panel)


def test_only_stop_can_be_pressed_while_it_runs_and_nothing_while_it_stops(panel, endless):
    panel.max_tokens.value = 5000
    panel.question.value = "Describe the picture."
    panel.ask()
    until(lambda: "tokens/s" in panel.status.value)
    assert panel.state == "running" and enabled(panel) == {"stop_button"}
    panel.stop()
    assert panel.stop_button.disabled
    assert panel.wait(10)
    assert panel.state == "idle"
    assert "stopped" in panel.conversation.value
    assert panel.history[-1]["content"].startswith("a purple cross")


def test_progress_does_not_undo_a_stop(panel):
    panel._enter("stopping", "Stopping ...")
    panel._show_progress("12 tokens")
    assert panel.state == "stopping" and "12 tokens" not in panel.status.value


def test_stop_pressed_before_the_first_token_is_not_lost(loaded, endless):
    rehearsing, goes_on = threading.Event(), threading.Event()

    def rehearse(messages, sampling):
        rehearsing.set()
        goes_on.wait(20)

    panel = PromptPanel(*loaded, rehearse=rehearse)
    panel.max_tokens.value = 5000
    panel.question.value = "Describe the picture."
    panel.ask()
    assert rehearsing.wait(20)
    panel.stop()
    goes_on.set()
    assert panel.wait(20)
    assert panel.state == "idle" and "stopped" in panel.conversation.value


def test_a_second_question_asked_while_one_runs_is_ignored(panel, endless):
    panel.max_tokens.value = 5000
    panel.question.value = "Describe the picture."
    panel.ask()
    worker = panel._worker
    panel.ask()
    assert panel._worker is worker
    until(lambda: panel._stream is not None)
    panel.stop()
    assert panel.wait(10)


def test_running_out_of_memory_says_how_much_is_missing_where_and_keeps_the_question(
    panel, monkeypatch
):
    ask(panel)
    with monkeypatch.context() as patched:
        fails_with(panel, patched, torch.OutOfMemoryError(OUT_OF_MEMORY))
        ask(panel, "What is at the top left?")
    assert panel.state == "error"
    assert "1.20 GiB short on GPU 1" in panel.status.value and "fewer tokens" in panel.status.value
    assert panel.question.value == "What is at the top left?"
    assert len(panel.history) == 2
    panel.ask()
    assert panel.wait(60)
    assert panel.state == "idle" and panel.history[-1]["content"] == "purple cross"


def test_20_simulated_out_of_memory_errors_end_at_the_same_byte(loaded):
    """A tiny card: the miniature and its activations for a short prompt fit, a long one's do
    not."""
    rig = Rig("T4")
    allocator = rig.allocators[0]
    with rig:
        model = AutoModelForCausalLM.from_pretrained(
            CHECKPOINT, device_map={"": 0}, dtype=torch.bfloat16
        )
    allocator.total_bytes = allocator.context_bytes + 80 * 2**20

    def rehearse(messages, sampling):
        tokens = len(messages[-1]["content"])
        prefill(model, make_prompt(model, Workload(text_tokens=tokens)))

    panel = PromptPanel(*loaded, rig=rig, rehearse=rehearse)
    ask(panel, "short")
    assert panel.state == "idle"
    before = rig.memory()[0].allocated_bytes
    after = set()
    for _ in range(20):
        ask(panel, "long " * 1500)
        assert panel.state == "error" and "short on GPU 0" in panel.status.value
        after.add((rig.memory()[0].allocated_bytes, rig.memory()[0].reserved_bytes))
    assert len(after) == 1 and next(iter(after))[0] == before
    ask(panel, "short")
    assert panel.state == "idle"


def test_any_other_error_is_told_with_its_type_and_the_panel_lives_on(panel, monkeypatch):
    with monkeypatch.context() as patched:
        fails_with(panel, patched, RuntimeError("expected all <tensors> on one device"))
        ask(panel)
    assert panel.state == "error"
    assert "RuntimeError: expected all &lt;tensors&gt; on one device" in panel.status.value
    ask(panel)
    assert panel.state == "idle"


def test_a_model_that_falls_silent_ends_as_an_error(loaded, monkeypatch):
    panel = PromptPanel(*loaded, timeout_seconds=0.3)
    released = hangs(panel, monkeypatch)
    try:
        ask(panel, seconds=10)
        assert panel.state == "error" and "TimeoutError: No token for 0.3 s" in panel.status.value
    finally:
        released.set()


def test_a_rig_in_use_by_a_cell_is_an_error_and_not_a_dead_panel(loaded):
    rig = Rig("L4")
    panel = PromptPanel(*loaded, rig=rig, rehearse=lambda messages, sampling: None)
    with rig:
        ask(panel)
        assert panel.state == "error" and "active already" in panel.status.value
    ask(panel)
    assert panel.state == "idle"


def test_a_checkpoint_is_loaded_while_the_panel_already_shows():
    panel = PromptPanel.from_checkpoint(CHECKPOINT)
    assert panel.state in ("loading", "idle")
    assert panel.wait(60)
    assert panel.state == "idle"
    ask(panel)
    assert panel.history[-1]["content"] == "4"


def test_a_checkpoint_that_cannot_be_loaded_is_an_error_state(tmp_path):
    panel = PromptPanel.from_checkpoint(tmp_path / "nothing")
    assert panel.wait(60)
    assert panel.state == "error" and "is no directory" in panel.status.value
    ask(panel)
    assert "No model is loaded" in panel.status.value


def test_running_out_of_memory_while_loading_advises_more_gpus(monkeypatch):
    def run_out(*args, **kwargs):
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    monkeypatch.setattr("glm4v_nb.widgets.panel.load", run_out)
    panel = PromptPanel.from_checkpoint(CHECKPOINT)
    assert panel.wait(60)
    assert "while loading: spread the model over more GPUs" in panel.status.value


def test_a_long_conversation_says_that_the_context_is_full(panel):
    panel.max_tokens.value = 8192
    ask(panel)
    assert panel.state == "error" and "start a new conversation" in panel.status.value


def test_the_picture_goes_with_the_first_message_only(panel):
    ask(panel)
    ask(panel, "What is at the top left?")
    assert ["image" in message for message in panel.history] == [True, False, False, False]
    assert panel.history[-1]["content"] == "purple cross"


def test_clear_forgets_the_conversation_and_keeps_the_picture(panel):
    ask(panel)
    panel.clear()
    assert panel.history == [] and "glm4v-turn" not in panel.conversation.value
    ask(panel)
    assert panel.history[-1]["content"] == "4"


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n" + b"0" * 50])
def test_a_bad_upload_leaves_the_picture_and_the_conversation(panel, content):
    ask(panel)
    picture = panel.image
    uploaded(panel, "<b>bad</b>.png", content)
    assert panel.state == "error" and "&lt;b&gt;bad&lt;/b&gt;.png" in panel.status.value
    assert panel.image is picture and len(panel.history) == 2
    assert panel.upload.value == ()


def test_a_good_upload_starts_a_new_conversation_with_it(panel):
    ask(panel)
    uploaded(panel, "<i>.png", encode(Image.new("RGB", (31, 17), "red"), "PNG"))
    assert panel.image.size == (31, 17) and panel.history == []
    assert "&lt;i&gt;.png · 31 × 17 pixels" in panel.picture.value
    assert panel.sample.value == "Uploaded: <i>.png"
    assert "New picture, new conversation" in panel.status.value


def test_an_uploaded_picture_can_be_taken_away_and_chosen_again(panel):
    uploaded(panel, "mine.png", encode(Image.new("RGB", (31, 17), "red"), "PNG"))
    panel.sample.value = "(no picture)"
    assert panel.image is None
    panel.sample.value = "Uploaded: mine.png"
    assert panel.image.size == (31, 17)


def test_an_upload_lets_go_of_the_one_before(panel):
    for name in ("first.png", "second.png"):
        uploaded(panel, name, encode(Image.new("RGB", (31, 17), "red"), "PNG"))
        ask(panel, "What shape is it?")
        pictures = [weakref.ref(panel.image)]
    uploaded(panel, "third.png", encode(Image.new("RGB", (9, 17), "blue"), "PNG"))
    gc.collect()
    assert [picture() for picture in pictures] == [None]
    assert [name for name in panel.sample.options if "Uploaded" in name] == ["Uploaded: third.png"]
    assert [name for name in panel.samples if "Uploaded" in name] == ["Uploaded: third.png"]
    # Also under its own name.
    uploaded(panel, "third.png", encode(Image.new("RGB", (8, 8), "blue"), "PNG"))
    assert panel.image.size == (8, 8)


def test_a_small_file_of_very_many_pixels_is_refused_before_it_is_decoded(panel):
    before = panel.image
    file = io.BytesIO()
    Image.new("1", (8200, 8200)).save(file, "PNG")
    assert len(file.getvalue()) < 50_000
    uploaded(panel, "vast.png", file.getvalue())
    assert "vast.png: The image file has too many pixels: 8200 × 8200" in panel.status.value
    assert panel.image is before


def test_a_picture_that_arrives_while_an_answer_runs_waits_for_its_end(panel, endless):
    panel.max_tokens.value = 5000
    panel.question.value = "Describe the picture."
    panel.ask()
    until(lambda: panel._stream is not None)
    before = panel.image
    uploaded(panel, "late.png", encode(Image.new("RGB", (31, 17), "red"), "PNG"))
    assert panel.image is before and panel.state == "running"
    panel.stop()
    assert panel.wait(20)
    assert panel.image.size == (31, 17) and panel.history == [] and panel.state == "idle"


def test_a_stop_that_comes_as_the_answer_ends_leaves_the_panel_usable(loaded, monkeypatch, endless):
    panel = PromptPanel(*loaded)
    panel.max_tokens.value = 5000
    panel.question.value = "Describe the picture."
    panel.ask()
    until(lambda: panel._stream is not None)
    original = panel._stream.cancel

    def cancel_and_let_the_worker_run():
        original()
        time.sleep(0.5)

    monkeypatch.setattr(panel._stream, "cancel", cancel_and_let_the_worker_run)
    panel.stop()
    assert panel.wait(20)
    assert panel.state == "idle" and "ask_button" in enabled(panel)


def test_memory_that_cannot_be_read_does_not_hide_the_error(panel, monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(panel.rig, "memory", broken)
    ask(panel)
    assert panel.state == "error" and "device-side assert" in panel.status.value
    assert "cannot be read" in panel.memory.value


def test_no_question_is_taken_while_a_given_up_answer_still_runs(loaded, monkeypatch):
    panel = PromptPanel(*loaded, timeout_seconds=0.3)
    with monkeypatch.context() as patched:
        released = hangs(panel, patched)
        ask(panel, seconds=10)
        assert "TimeoutError" in panel.status.value
        ask(panel, seconds=10)
        assert "still runs" in panel.status.value
        released.set()
        until(lambda: not panel._hung.running)
    panel.timeout_seconds = 60
    ask(panel)
    assert panel.state == "idle"


def test_sample_pictures_of_any_kind_are_taken(loaded):
    panel = PromptPanel(*loaded, samples={"print": Image.new("CMYK", (20, 10))})
    assert panel.image.size == (20, 10)


def test_every_text_from_outside_is_escaped():
    attack = "<script>alert('1')</script>"
    for shown in (
        html.turn("You", attack),
        html.turn("Model", "x", attack),
        html.status("error", attack),
        html.picture(None, attack),
        html.picture(Image.new("RGB", (8, 8)), attack),
        html.memory_bars(Rig.here().memory(), attack),
    ):
        assert "<script" not in shown and "&lt;script&gt;" in shown


def test_no_widget_of_the_panel_is_an_output(panel):
    def walk(widget):
        yield widget
        for child in getattr(widget, "children", ()):
            yield from walk(child)

    found = list(walk(panel))
    assert len(found) > 15
    assert not [widget for widget in found if isinstance(widget, ipywidgets.Output)]
