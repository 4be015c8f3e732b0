"""Draws the pictures and held-out questions that ship with the miniature.

python -m tools.miniature.examples
"""

import json

import numpy as np
from PIL import Image

from glm4v_nb.miniature import EXAMPLES, SAMPLES
from glm4v_nb.miniature.evaluate import COLUMNS, SIDE
from glm4v_nb.model.image_processing import load_image
from tools.miniature.evaluate import HELD_OUT_SEED, held_out_question
from tools.miniature.scenes import draw, random_scene

HEAD = """\
# A hundred questions that training never saw, and their only right answers; the picture of each
# is a square of held_out.jpeg, from left to right and down. `python -m tools.miniature.examples`
# draws both anew.
"""


def samples() -> dict[str, Image.Image]:
    """The pictures to try, by name; the same every time."""
    generators = map(np.random.default_rng, (11, 5, 8, 4))
    scenes = map(random_scene, generators, (5, 3, 2, 1))
    return {name: draw(scene, (320, 240)) for name, scene in zip(SAMPLES, scenes, strict=True)}


def held_out(count: int = 100, seed: int = 4) -> tuple[Image.Image, list[tuple[str, str]]]:
    """All pictures on one sheet, squeezed as the miniature sees them; questions and answers."""
    rng, asked = np.random.default_rng([HELD_OUT_SEED, seed]), []
    sheet = Image.new("RGB", (COLUMNS * SIDE, -(-count // COLUMNS) * SIDE))
    for number in range(count):
        file, question, answer, *_ = held_out_question(rng)
        picture = load_image(file).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        sheet.paste(picture, (number % COLUMNS * SIDE, number // COLUMNS * SIDE))
        asked.append((question, answer))
    return sheet, asked


def main():
    """Write the files."""
    for name, picture in samples().items():
        file = EXAMPLES / f"{name.lower().replace(' ', '_')}.png"
        picture.save(file, optimize=True)
    sheet, asked = held_out()
    sheet.save(EXAMPLES / "held_out.jpeg", quality=90, subsampling=0)
    rows = "".join(f"    {json.dumps(pair, ensure_ascii=False)},\n" for pair in asked)
    table = f"{HEAD}questions = [\n{rows}]\n"
    (EXAMPLES / "held_out.toml").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
