"""What the widgets show, as HTML; every text that comes from outside is escaped here."""

import base64
import io
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from glm4v_nb.inference import Answer
from simgpu import CardMemory
from simgpu.oom import parse_out_of_memory

GIB, MIB = 2**30, 2**20


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


STYLE = f"<style>{_file('panel.css')}</style>"
# What Jupyter's server passes on in one message (tornado's default of 10 MiB, or what `make lab`
# sets, which tells its kernels), without the rest of the message.
MOST_UPLOAD_BYTES = (int(os.environ.get("GLM4V_NB_MESSAGE_MIB", 10)) - 1) * MIB
# Scripts of a widget's HTML do not run; the error of an image that cannot be shown does.
SCRIPT = (
    f"<img alt='' src='data:,' style='display:none' data-most-bytes='{MOST_UPLOAD_BYTES}'"
    f" onerror='{escape(_file('panel.js'))}'>"
)


def gib(size_bytes: int) -> str:
    """ "1.25 GiB", or MiB below a tenth of one: bars of one picture are read side by side."""
    is_small = size_bytes < GIB / 10
    return f"{size_bytes / MIB:.0f} MiB" if is_small else f"{size_bytes / GIB:.2f} GiB"


def note(text: str) -> str:
    """A small remark."""
    return f"<div class='glm4v-note'>{escape(text)}</div>"


def turn(who: str, text: str, remark: str = "") -> str:
    """One question ("You") or answer of the conversation."""
    kind = "user" if who == "You" else "model"
    return (
        f"<div class='glm4v-turn glm4v-{kind}'><div class='glm4v-who'>{escape(who)}</div>"
        f"{escape(text)}{note(remark) if remark else ''}</div>"
    )


def answer_note(answer: Answer) -> str:
    """Tokens, speed, and how it ended if not by itself."""
    endings = {"cancelled": " · stopped", "length": " · reached max tokens"}
    speed = f" · {answer.tokens_per_second:.1f} tokens/s" if answer.tokens_per_second else ""
    plural = "" if answer.new_tokens == 1 else "s"
    return f"{answer.new_tokens} token{plural}{speed}{endings.get(answer.finish, '')}"


def status(state: str, message: str) -> str:
    """The line that says what the panel is doing; screen readers announce it."""
    return (
        f"<div class='glm4v-status glm4v-status-{state}' role='status' aria-live='polite'>"
        f"<b>{escape(state.capitalize())}</b> · {escape(message)}</div>"
    )


def memory_bars(memory: Sequence[CardMemory], provenance: str) -> str:
    """One bar per card: dark what is in use, light the peak of this question."""
    rows = []
    for card in memory:
        label = "Host memory" if card.card == "host" else f"GPU {card.index} · {card.card}"
        sizes = (card.reserved_bytes, card.peak_reserved_bytes, card.capacity_bytes)
        used, peak, capacity = map(gib, sizes)
        text = f"{label}: {used} of {capacity}, peak {peak}"
        used, peak = (100 * size / card.capacity_bytes for size in sizes[:2])
        rows.append(
            f"{note(text)}<div class='glm4v-bar' role='meter' aria-label='{escape(label)}'"
            f" aria-valuemin='0' aria-valuemax='100' aria-valuenow='{used:.0f}'"
            f" aria-valuetext='{escape(text)}'><div"
            f" style='width:{peak:.1f}%;background:#56B4E9'></div><div"
            f" style='width:{used:.1f}%;background:#0072B2'></div></div>"
        )
    return "".join(rows) + note(provenance)


def out_of_memory_advice(error: BaseException, max_new_tokens: int) -> str:
    """What was missing where, and what to change."""
    try:
        found = parse_out_of_memory(error)
        sizes = (found.short_bytes, found.tried_bytes, found.free_bytes)
        short, tried, free = map(gib, sizes)
        where = f"{short} short on GPU {found.device} (a tensor of {tried} for {free} free)"
    except ValueError:
        where = str(error).splitlines()[0][:200]
    return (
        f"Out of memory: {where}. Try fewer tokens (max tokens is {max_new_tokens}), a shorter"
        " question, or a new conversation; for good, spread the model over more GPUs. Memory has"
        " been given back, your question is still in the box."
    )


def picture(image: Image.Image | None, name: str) -> str:
    """A thumbnail of at most 240 pixels a side with name and size; or the name alone."""
    if image is None:
        return note(name)
    scale = min(1, 240 / max(image.size))
    sides = [max(1, round(scale * side)) for side in image.size]
    small = image.resize(sides, reducing_gap=2.0)  # without a copy of the whole
    file = io.BytesIO()
    small.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f"<img class='glm4v-picture' alt='Picture in question: {escape(name)}'"
        f" src='data:image/png;base64,{data}'>"
        f"{note(f'{name} · {image.width} × {image.height} pixels')}"
    )
