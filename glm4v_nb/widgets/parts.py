"""What the panel shows, as HTML; every text that comes from outside is escaped here."""

import base64
from collections.abc import Sequence
from html import escape

from PIL import Image

from glm4v_nb.inference import Answer
from glm4v_nb.miniature.scenes import encode
from simgpu import CardMemory
from simgpu.oom import parse_out_of_memory

GIB = 2**30
THUMBNAIL_PIXELS = 240

# The colours follow JupyterLab's theme; elsewhere the fallbacks hold.
STYLE = """<style>
.glm4v-panel { max-width: 64rem; padding: 4px; }
.glm4v-panel .widget-textarea textarea, .glm4v-panel select { box-sizing: border-box; }
/* Upside down and back, the browser keeps the newest words in view. */
.glm4v-panel .glm4v-history { max-height: 24rem; overflow-y: auto; display: flex; flex-direction: column-reverse; }
.glm4v-history > * { flex: none; }
.glm4v-picture { max-width: 100%; border: 1px solid var(--jp-border-color2, #ccc); }
.glm4v-turn { margin: 6px 0; padding: 6px 10px; border-radius: 6px; white-space: pre-wrap; line-height: 1.4;
  overflow-wrap: anywhere; color: var(--jp-ui-font-color1, #222); }
.glm4v-user { background: var(--jp-layout-color2, #eee); margin-left: 15%; }
.glm4v-model { border: 1px solid var(--jp-border-color2, #ccc); margin-right: 15%; }
.glm4v-who, .glm4v-note { color: var(--jp-ui-font-color2, #555); font-size: 0.85em; line-height: 1.35; }
.glm4v-status { padding: 4px 10px; border-left: 4px solid #0072B2; line-height: 1.4; overflow-wrap: anywhere;
  color: var(--jp-ui-font-color1, #222); }
.glm4v-status-error { border-left-color: #D55E00; }
.glm4v-status-running, .glm4v-status-stopping, .glm4v-status-loading { border-left-color: #E69F00; }
.glm4v-bar { position: relative; height: 14px; border-radius: 3px; background: var(--jp-layout-color2, #eee);
  border: 1px solid var(--jp-border-color2, #ccc); overflow: hidden; }
.glm4v-bar div { position: absolute; top: 0; bottom: 0; left: 0; }
</style>"""

# ipywidgets has no key events: one listener for the page presses Ask of the panel that has the
# focus.
CONTROL_ENTER = (
    "<img alt='' src='data:,' style='display:none' onerror=\""
    "if (!window.glm4vControlEnter) { window.glm4vControlEnter = true;"
    "document.addEventListener('keydown', event => {"
    "if (!(event.ctrlKey || event.metaKey) || event.key !== 'Enter') return;"
    "const panel = event.target.closest && event.target.closest('.glm4v-panel');"
    "if (!panel || event.target.tagName !== 'TEXTAREA') return;"
    "event.preventDefault(); event.stopPropagation();"
    # The last keystroke has to reach the kernel before the click does.
    "setTimeout(() => panel.querySelector('.glm4v-ask').click(), 150);"
    '}, true); }">'
)


def gib(size_bytes: int) -> str:
    """ "1.25 GiB", or MiB below a tenth of one."""
    return (
        f"{size_bytes / GIB:.2f} GiB" if size_bytes >= GIB / 10 else f"{size_bytes / 2**20:.0f} MiB"
    )


def note(text: str) -> str:
    """A small remark."""
    return f"<div class='glm4v-note'>{escape(text)}</div>"


def turn(who: str, text: str, remark: str = "") -> str:
    """One question ("You") or answer of the conversation."""
    kind = "user" if who == "You" else "model"
    ending = note(remark) if remark else ""
    return (
        f"<div class='glm4v-turn glm4v-{kind}'><div class='glm4v-who'>{escape(who)}</div>"
        f"{escape(text)}{ending}</div>"
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
        used, peak = (
            100 * size / card.capacity_bytes
            for size in (card.reserved_bytes, card.peak_reserved_bytes)
        )
        text = (
            f"{label}: {gib(card.reserved_bytes)} of {gib(card.capacity_bytes)}, "
            f"peak {gib(card.peak_reserved_bytes)}"
        )
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
        where = f"{gib(found.short_bytes)} short on GPU {found.device}"
        where += f" (a tensor of {gib(found.tried_bytes)} for {gib(found.free_bytes)} free)"
    except ValueError:
        where = str(error).splitlines()[0][:200]
    return (
        f"Out of memory: {where}. Try fewer tokens (max tokens is {max_new_tokens}), a shorter"
        " question, or a new conversation; for good, spread the model over more GPUs. Memory has"
        " been given back, your question is still in the box."
    )


def picture(image: Image.Image | None, name: str) -> str:
    """A thumbnail of at most 240 pixels a side with its name and size; the name alone without an
    image."""
    if image is None:
        return note(name)
    small = image.copy()
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    data = base64.b64encode(encode(small, "PNG")).decode()
    return (
        f"<img class='glm4v-picture' alt='Picture in question: {escape(name)}'"
        f" src='data:image/png;base64,{data}'>"
        f"{note(f'{name} · {image.width} × {image.height} pixels')}"
    )
