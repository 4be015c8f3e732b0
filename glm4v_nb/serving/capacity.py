"""How many positions a request may have, so that whatever is let in fits: tried at the start.

A formula would have to be told of each workspace of prefill and step. Instead the worst is run once
before the first request: the cache for all rows, a prompt with an image as long as may come, and a
step of all rows at their last position. What is too large for the cards makes way for less.
"""

from dataclasses import dataclass

import torch

from glm4v_nb.cleanup import clear_frames, empty_caches
from glm4v_nb.serving.cache import RowCache, Steps, prefill
from glm4v_nb.workload import Workload, make_prompt
from simgpu.units import bytes_in_words

STEP = 256  # positions; what is tried differs by an eighth and is a multiple of this


@dataclass(frozen=True)
class Room:
    """Attributes:
    cache: made, for all rows.
    why: in words, why a request may have so many positions and no more.
    """

    cache: RowCache
    why: str


def find_room(model, rows: int, positions: int | None = None) -> Room:
    """The cache for the longest requests that the cards have room for, so many at a time.

    On a CPU nothing is tried, as a long prompt takes minutes there; memory is not looked at.

    Args:
        positions: most of a request, prompt and answer; None: the model's context.

    Raises:
        ValueError: impossible numbers; a layer is offloaded.
        torch.OutOfMemoryError: no room even for an image with a short question.
    """
    config = model.config
    least = min(config.seq_length, config.vision_config.image_tokens + STEP)
    if positions is not None and not 2 <= positions <= config.seq_length:
        raise ValueError(
            f"positions is {positions}; expected 2 to {config.seq_length:,}, the model's context."
        )
    if rows < 1:
        raise ValueError(f"rows is {rows}; expected how many requests run at a time, at least 1.")
    most = wanted = positions or config.seq_length
    if not model.lm_head.weight.is_cuda:
        cache = RowCache(model, rows, most)
        why = "that was asked for" if positions else "the model's context"
        return Room(cache, f"{why}; on a CPU memory is not looked at")
    while True:
        try:
            cache = RowCache(model, rows, most)
            _try_worst(model, cache)
            break
        except torch.OutOfMemoryError as error:
            cache = None
            clear_frames(error)
            if most <= least:
                raise
        empty_caches()
        most = max(least, most * 7 // 8 // STEP * STEP)
    size = bytes_in_words(cache.bytes)
    if most == wanted:
        return Room(cache, f"{size} of cache; the worst was run and fitted")
    return Room(cache, f"{size} of cache; {wanted:,} did not fit. Fewer --rows leave room for more")


def _try_worst(model, cache: RowCache):
    """The longest prompt, with an image where there is room for one; then a step of all rows."""
    images = int(cache.capacity > model.config.vision_config.image_tokens)
    text = cache.capacity - images * model.config.vision_config.image_tokens
    prompt = make_prompt(model, Workload(images=images, text_tokens=text))
    prefill(model, prompt, cache, 0)
    rows = list(range(cache.sequences))
    last = [cache.capacity - 1] * len(rows)
    logits = Steps(model, cache)(rows, [0] * len(rows), last, last)
    logits.argmax(-1)
