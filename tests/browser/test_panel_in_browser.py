"""The prompting panel as a reader meets it: in JupyterLab, in a browser."""

import io
import os
import re
import struct
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import expect

from tools.miniature.scenes import Scene, Shape, draw

pytestmark = pytest.mark.timeout(600)
SCREENSHOTS = os.environ.get("GLM4V_NB_SCREENSHOTS")


class Panel:
    """The panel with a given number on the page, by what a reader sees of it."""

    def __init__(self, page, number: int):
        self.page = page
        self.root = page.locator(".glm4v-panel").nth(number)
        self.question = self.root.get_by_label("Question")
        self.max_tokens = self.root.get_by_label("Max tokens")
        self.sample = self.root.get_by_label("Sample")
        self.ask_button = self.root.get_by_role("button", name="Ask", exact=True)
        self.stop_button = self.root.get_by_role("button", name="Stop", exact=True)
        self.clear_button = self.root.get_by_role("button", name="New conversation")
        self.upload_button = self.root.get_by_role("button", name=re.compile("Upload a picture"))
        self.status = self.root.get_by_role("status")
        self.turns = self.root.locator(".glm4v-turn")
        self.picture = self.root.get_by_role("img", name=re.compile("Picture in question"))

    def state(self) -> str:
        return self.status.locator("b").inner_text()

    def wait_for(self, *states: str, seconds: float = 60):
        self.status.locator("b").filter(has_text=re.compile("|".join(states))).wait_for(
            timeout=1000 * seconds
        )

    def ask(self, text: str):
        self.question.fill(text)
        self.page.wait_for_timeout(100)  # as a hand needs between the last key and the button
        self.ask_button.click()

    def answer(self, text: str, seconds: float = 150) -> str:
        """Ask and wait: the answer's text."""
        before = self.turns.count()
        self.ask(text)
        # They are shown while it runs; "Idle" may still be what something before it has left.
        expect(self.turns).to_have_count(before + 2, timeout=1000 * seconds)
        self.wait_for("Idle", "Error", seconds=seconds)
        assert self.state() == "Idle", self.status.inner_text()
        return self.turns.last.inner_text().splitlines()[1]

    def clear(self):
        self.clear_button.click()
        expect(self.turns).to_have_count(0)

    def upload(self, name: str, content: bytes):
        with self.page.expect_file_chooser() as chooser:
            self.upload_button.click()
        chooser.value.set_files({"name": name, "mimeType": "image/png", "buffer": content})

    def screenshot(self, name: str):
        if SCREENSHOTS:
            self.root.screenshot(path=Path(SCREENSHOTS) / f"{name}.png")


@pytest.fixture
def panel(page):
    """The first panel of the notebook, with the miniature, as good as new."""
    found = Panel(page, 0)
    found.root.scroll_into_view_if_needed()
    found.wait_for("Idle", "Error")
    found.max_tokens.fill("128")
    found.max_tokens.press("Tab")
    found.sample.select_option("Five shapes")
    found.picture.wait_for()
    found.clear()
    return found


@pytest.fixture
def endless(kernel):
    """Answers of thousands of tokens: the miniature's never end by themselves."""
    kernel(
        "ending = model.generation_config.eos_token_id; model.generation_config.eos_token_id = None"
    )
    yield
    kernel("model.generation_config.eos_token_id = ending")


def picture_of(shape="star", colour="purple", rgb=(128, 0, 128), size=(320, 320)) -> Image.Image:
    one = Shape(shape, colour, rgb, cell=4, x=0.5, y=0.5, radius=0.25)
    return draw(Scene((one,), ((255, 255, 255),) * 2, "plain", 0.0, 0), size)


def file_of(picture: Image.Image, format="PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def black_png(side: int) -> bytes:
    """A well-formed 1-bit PNG of any size, which packs into very few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    rows = zlib.compress(bytes((side // 8 + 1) * side), 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def test_a_photograph_of_14_megabytes_arrives(panel):
    # Noise does not pack, so the file is as long as its pixels: longer than the 10 MiB that a
    # Jupyter server passes on by default.
    side = 2200
    photograph = file_of(Image.frombytes("RGB", (side, side), os.urandom(3 * side * side)))
    assert len(photograph) > 14_000_000
    panel.upload("photograph.png", photograph)
    panel.root.get_by_text(f"photograph.png · {side} × {side} pixels").wait_for()


def test_a_file_that_the_server_would_not_pass_on_is_not_sent_and_the_next_one_arrives(
    panel, tmp_path
):
    path = tmp_path / "<b>long.png"
    path.write_bytes(bytes(70_000_000))
    with panel.page.expect_file_chooser() as chooser:
        panel.upload_button.click()
    chooser.value.set_files(path)
    panel.wait_for("Error")
    said = panel.status.inner_text()
    assert "<b>long.png has 70.0 MB; expected at most 66.1" in said
    for name in ("short.png", "shorter.png"):  # after each the kernel's own status is the same
        panel.upload(name, file_of(picture_of()))
        panel.root.get_by_text(f"{name} · 320 × 320 pixels").wait_for()
        panel.wait_for("Idle")
        with panel.page.expect_file_chooser() as chooser:
            panel.upload_button.click()
        chooser.value.set_files(path)
        panel.wait_for("Error")
    panel.sample.select_option("One shape")
    panel.wait_for("Idle")


def test_an_uploaded_picture_is_shown_and_its_colour_told(panel):
    panel.upload("my star.png", file_of(picture_of()))
    panel.root.get_by_text("my star.png · 320 × 320 pixels").wait_for()
    assert panel.picture.get_attribute("alt") == "Picture in question: my star.png"
    assert panel.answer("What colour is the star?") == "purple"
    panel.screenshot("uploaded")


def test_a_second_question_is_about_the_same_picture(panel):
    panel.upload("heart.jpg", file_of(picture_of("heart", "orange", (255, 150, 0)), "JPEG"))
    panel.root.get_by_text("heart.jpg · ").wait_for()
    assert panel.answer("What shape is the object?") == "heart"
    assert panel.answer("What colour is the heart?") == "orange"
    assert panel.turns.count() == 4


def test_control_enter_sends_the_question(panel):
    panel.question.click()
    panel.page.keyboard.type("How many crosses are there?")
    panel.page.keyboard.press("Control+Enter")
    panel.turns.nth(1).locator(".glm4v-note").wait_for()
    assert panel.turns.last.inner_text().splitlines()[1] == "4"
    assert panel.root.is_visible()  # the cell did not run again


def stopped_after(panel) -> float:
    """Press Stop; seconds until the panel is idle."""
    pressed = time.monotonic()
    panel.stop_button.click()
    panel.wait_for("Idle")
    return time.monotonic() - pressed


def test_an_answer_grows_while_it_is_made_and_stop_ends_it_within_a_second(panel, endless):
    panel.max_tokens.fill("6000")
    panel.max_tokens.press("Tab")
    panel.ask("Describe the picture.")
    panel.wait_for("Running")
    lengths = set()
    deadline = time.monotonic() + 20
    while len(lengths) < 5 and time.monotonic() < deadline:
        lengths.add(len(panel.turns.last.inner_text()))
        panel.page.wait_for_timeout(100)
    assert len(lengths) >= 5, "the answer did not grow step by step"
    assert "tokens/s" in panel.status.inner_text()
    assert panel.ask_button.is_disabled() and panel.stop_button.is_enabled()
    panel.screenshot("streaming")
    took = [stopped_after(panel)]
    while (
        min(took) >= 1.0 and len(took) < 3
    ):  # something else may have had the machine for a moment
        panel.ask("Describe the picture.")
        panel.wait_for("Running")
        panel.page.wait_for_timeout(1000)
        took.append(stopped_after(panel))
    assert min(took) < 1.0
    assert "stopped" in panel.turns.last.inner_text()
    assert panel.ask_button.is_enabled() and panel.stop_button.is_disabled()


def test_the_panel_answers_after_a_stop(panel):
    assert panel.answer("How many crosses are there?") == "4"


@pytest.mark.parametrize(
    "attack",
    [
        "<script>window.attacked = 1</script>",
        "<img src=x onerror='window.attacked = 1'>",
        "</div><b>bold</b>",
    ],
)
def test_markup_in_a_question_is_shown_as_text(panel, attack):
    panel.answer(attack)
    assert panel.turns.first.inner_text().splitlines()[1] == attack
    assert panel.page.evaluate("window.attacked") is None
    assert panel.turns.locator("script, img, b").count() == 0


def test_markup_in_a_file_name_is_shown_as_text(panel):
    name = "<img src=x onerror='window.attacked = 1'>.png"
    panel.upload(name, file_of(picture_of()))
    panel.root.get_by_text(f"{name} · ").wait_for()
    panel.upload("<script>alert(1)<script>.png", b"no picture")
    panel.status.filter(has_text="<script>alert(1)").wait_for()
    assert panel.page.evaluate("window.attacked") is None


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("notes.png", b"These are notes, not a picture.", "cannot be read as an image"),
        (
            "half.jpg",
            file_of(picture_of(size=(900, 900)), "JPEG", quality=95)[:9000],
            "cannot be read as an image",
        ),
        ("vast.png", black_png(30_000), "too many pixels"),
        ("empty.png", b"", "cannot be read"),
    ],
    ids=["text", "truncated", "vast", "empty"],
)
def test_a_bad_file_gets_a_clear_error_and_the_panel_lives_on(panel, name, content, said):
    panel.upload(name, content)
    panel.wait_for("Error")
    text = panel.status.inner_text()
    assert name in text and re.search(said, text), text
    assert "The picture before it is still chosen" in text
    panel.screenshot(f"bad_{name.partition('.')[0]}")
    assert panel.answer("How many crosses are there?") == "4"


def test_an_animation_gives_its_first_picture(panel):
    first, second = picture_of(), picture_of("circle", "red", (255, 0, 0))
    panel.upload(
        "moving.gif", file_of(first, "GIF", save_all=True, append_images=[second], duration=100)
    )
    panel.root.get_by_text("moving.gif · ").wait_for()
    assert panel.answer("What colour is the object?") == "purple"


def test_another_picture_starts_another_conversation(panel):
    panel.answer("How many crosses are there?")
    panel.sample.select_option("One shape")
    panel.status.filter(has_text="New picture, new conversation").wait_for()
    assert panel.turns.count() == 0


def test_an_empty_question_says_so(panel):
    panel.question.fill("  ")
    panel.ask_button.click()
    panel.status.filter(has_text="The question is empty").wait_for()


def test_running_out_of_memory_is_a_state_with_advice_and_the_next_question_works(page):
    panel = Panel(page, 1)
    panel.root.scroll_into_view_if_needed()
    panel.wait_for("Idle", "Error")
    panel.clear()
    panel.answer("How many crosses are there?", seconds=120)
    panel.screenshot("memory")
    question = "shape " * 3200
    panel.ask(question)
    panel.wait_for("Error", seconds=120)
    text = panel.status.inner_text()
    assert re.search(r"Out of memory: \d+\.\d\d GiB short on GPU 0 .*fewer tokens", text), text
    assert panel.question.input_value() == question  # nothing typed is lost
    bar = panel.root.get_by_role("meter")
    assert "25.9" in bar.get_attribute("aria-valuetext").split(" of ")[0]
    panel.screenshot("out_of_memory")
    panel.answer("How many crosses are there?", seconds=120)
