"""Questions about a colour that the miniature has never been told of, drawn as its others are.

"teal" is no word of its vocabulary either: it is spelt in four tokens, " t", "e", "a", "l". It is
asked about in English alone; what is asked besides is in English and Chinese.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from tools.miniature.questions import KINDS, ask, sample
from tools.miniature.scenes import COLOURS, draw, is_wide, random_scene, random_size

NEW = "teal"
SHADES = [[0, 128, 128], [0, 170, 170], [32, 178, 170], [0, 150, 160]]
Example = tuple[Image.Image, str, str, str]


@contextmanager
def painted() -> Iterator[None]:
    """Within the block scenes have the new colour, too."""
    COLOURS[NEW] = SHADES
    try:
        yield
    finally:
        del COLOURS[NEW]


def examples(rng: np.random.Generator, count: int, new: float = 1.0) -> list[Example]:
    """(picture, question, answer, kind), a share ``new`` of them about the new colour: it is named
    in question or answer. The others are as the miniature was trained on."""
    found = []
    for _ in range(count):
        if rng.random() < new:
            with painted():
                found.append(_about_new(rng))
        else:
            found.append(_as_before(rng))
    return found


def _about_new(rng: np.random.Generator) -> Example:
    while True:
        size = random_size(rng)
        scene = random_scene(rng, wide=is_wide(size))
        # One in ten asks for it where it is not.
        if not any(one.colour == NEW for one in scene.objects) and rng.random() < 0.9:
            continue
        for _ in range(20):
            kind = str(rng.choice(KINDS))
            asked = ask(scene, kind, "en", rng)
            if asked is not None and (NEW in asked[0] or NEW in asked[1]):
                return draw(scene, size), *asked, kind


def _as_before(rng: np.random.Generator) -> Example:
    size = random_size(rng)
    scene, question, answer, kind, _ = sample(rng, wide=is_wide(size))
    return draw(scene, size), question, answer, kind
