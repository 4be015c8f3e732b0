"""The question grammar: English and Chinese questions about a scene, each with one exact answer.

Kinds; the phrasings are in ``grammar.toml``. An *object* is described by shape, by colour or by
both, and only questions with exactly one right answer are asked:

========= ============================================== =========================================
kind      question, for example                          answer
========= ============================================== =========================================
shape     What shape is the red object?                  circle
colour    What colour is the circle?                     red
count     How many objects / circles / red objects …?    3 (0 if there is none)
where     Where is the red circle?                       top left (one of the nine cells)
place     What is at the top left?                       red circle, or: nothing
larger    Which is larger, the red circle or the …?      red circle (radii differ by a quarter)
exists    Is there a red circle?                         yes / no
absent    What colour is / where is the star? (none)     there is no star
describe  Describe the picture.                          a red circle at the top left, a …
========= ============================================== =========================================
"""

import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from tools.miniature.scenes import CELLS, COLOURS, SHAPES, Scene, Shape, random_scene

_GRAMMAR = tomllib.loads(Path(__file__).with_name("grammar.toml").read_text(encoding="utf-8"))
LANGUAGES = ("en", "zh")
CHINESE: dict[str, str] = _GRAMMAR["chinese"]
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
QUESTIONS: dict[str, dict[str, list[str]]] = _GRAMMAR["questions"]
KINDS = ("shape", "colour", "count", "where", "place", "larger", "exists", "absent", "describe")
Question = tuple[str, str]


def sample(rng, wide: bool = False, grey: bool = False) -> tuple[Scene, str, str, str, str]:
    """Drawn: (scene, question, answer, kind, language). See ``random_scene`` for the options."""
    kind, language = str(rng.choice(KINDS)), str(rng.choice(LANGUAGES))
    while True:
        scene = random_scene(rng, wide=wide, grey=grey)
        if found := ask(scene, kind, language, rng):
            return scene, *found, kind, language


def ask(scene: Scene, kind: str, language: str, rng: np.random.Generator) -> Question | None:
    """A question of this kind about this scene with its answer; None if the scene allows none."""
    if kind == "describe":
        return _phrase(kind, language, rng), describe(scene.objects, language)
    return _ASK[kind](scene.objects, language, rng)


def word(language: str, english: str) -> str:
    """The name of a shape, a colour or a cell in the language."""
    return english if language == "en" else CHINESE[english]


def name(language: str, shape: str | None = None, colour: str | None = None) -> str:
    """ "red circle", "circle" or "red object" in the language."""
    if language == "en":
        return " ".join(part for part in (colour, shape or "object") if part)
    kind = CHINESE[shape] if shape else "物体"
    return f"{CHINESE[colour]}的{kind}" if colour else kind


def describe(objects: tuple[Shape, ...], language: str) -> str:
    """The fixed form of a description, objects in reading order."""
    if language == "zh":
        return "，".join(
            f"{_at(one.cell, 'zh')}有一个{name('zh', one.shape, one.colour)}" for one in objects
        )
    return ", ".join(
        f"{'an' if one.colour == 'orange' else 'a'} {one.colour} {one.shape} {_at(one.cell, 'en')}"
        for one in objects
    )


def _at(cell: int, language: str) -> str:
    place = CELLS[cell]
    if language == "zh":
        return CHINESE[place]
    preposition = {"centre": "in", "left": "on", "right": "on"}.get(place, "at")
    return f"{preposition} the {place}"


def _phrase(kind: str, language: str, rng: np.random.Generator, **parts: str) -> str:
    forms = QUESTIONS[kind][language]
    text = forms[rng.integers(len(forms))].format(**parts)
    # People leave the question mark out, and the capital.
    text = text.rstrip("?.？。") if rng.random() < 0.1 else text
    text = text[0].lower() + text[1:] if rng.random() < 0.1 else text
    return text.replace(" a orange", " an orange")


def _pick(items, rng: np.random.Generator):
    return items[rng.integers(len(items))] if items else None


def _unique_names(objects, language: str) -> list[tuple[Shape, str]]:
    """Every shape-only, colour-only or full name that fits exactly one object."""
    names = [
        (one, name(language, shape, colour))
        for one in objects
        for shape, colour in ((one.shape, None), (None, one.colour), (one.shape, one.colour))
    ]
    texts = [text for _, text in names]
    return [(one, text) for one, text in names if texts.count(text) == 1]


def _attribute(objects, language, rng, asked: str, given: str) -> Question | None:
    """Asks for the shape of the one object of a colour, or for the colour of the one of a shape."""
    if len(objects) == 1 and rng.random() < 0.3:
        text, one = _phrase(f"{asked}_alone", language, rng), objects[0]
    else:
        values = [getattr(one, given) for one in objects]
        one = _pick([one for one in objects if values.count(getattr(one, given)) == 1], rng)
        if one is None:
            return None
        text = _phrase(asked, language, rng, o=word(language, getattr(one, given)))
    return text, word(language, getattr(one, asked))


def _count(objects, language, rng) -> Question:
    choice = rng.integers(3)
    target = _pick(objects, rng) if rng.random() < 0.8 else None
    shape = target.shape if target else str(rng.choice(SHAPES))
    colour = target.colour if target else str(rng.choice(list(COLOURS)))
    if choice == 0:
        number = len(objects)
        what = {"en": _pick(("objects", "shapes"), rng), "zh": "物体"}[language]
    elif choice == 1:
        number = sum(one.shape == shape for one in objects)
        what = PLURALS[shape] if language == "en" else CHINESE[shape]
    else:
        number = sum(one.colour == colour for one in objects)
        what = f"{colour} objects" if language == "en" else name("zh", None, colour)
    return _phrase("count", language, rng, o=what), str(number)


def _where(objects, language, rng) -> Question | None:
    if found := _pick(_unique_names(objects, language), rng):
        one, called = found
        return _phrase("where", language, rng, o=called), word(language, CELLS[one.cell])


def _place(objects, language, rng) -> Question:
    cells = {one.cell: one for one in objects}
    cell = _pick(list(cells), rng) if rng.random() < 0.75 else int(rng.integers(9))
    text = _phrase("place", language, rng, p=_at(cell, language))
    if cell not in cells:
        return text, "nothing" if language == "en" else "什么都没有"
    return text, name(language, cells[cell].shape, cells[cell].colour)


def _larger(objects, language, rng) -> Question | None:
    by_shape = [
        (one, text)
        for one, text in _unique_names(objects, language)
        if "object" not in text and "物体" not in text
    ]
    pairs = [(a, b) for a in by_shape for b in by_shape if a[0].radius > 1.25 * b[0].radius]
    if not pairs:
        return None
    larger, smaller = _pick(pairs, rng)
    first, second = (larger, smaller) if rng.random() < 0.5 else (smaller, larger)
    return _phrase("larger", language, rng, o=first[1], q=second[1]), larger[1]


def _absent_name(objects, language, rng) -> str:
    while True:
        near = _pick(objects, rng)
        # Half of the absent things share the shape or the colour of something present.
        shape = near.shape if rng.random() < 0.35 else str(rng.choice(SHAPES))
        colour = near.colour if rng.random() < 0.35 else str(rng.choice(list(COLOURS)))
        form = rng.integers(3)
        if form == 0 and all(one.shape != shape for one in objects):
            return name(language, shape)
        if form == 1 and all(one.colour != colour for one in objects):
            return name(language, None, colour)
        if form == 2 and all((one.shape, one.colour) != (shape, colour) for one in objects):
            return name(language, shape, colour)


def _exists(objects, language, rng) -> Question:
    if rng.random() < 0.5:
        text = _phrase("exists", language, rng, o=_absent_name(objects, language, rng))
        return text, "no" if language == "en" else "没有"
    one = _pick(objects, rng)
    shape, colour = _pick(((one.shape, None), (None, one.colour), (one.shape, one.colour)), rng)
    text = _phrase("exists", language, rng, o=name(language, shape, colour))
    return text, "yes" if language == "en" else "有"


def _absent(objects, language, rng) -> Question:
    missing = _absent_name(objects, language, rng)
    is_shape = missing in {word(language, shape) for shape in SHAPES}
    kind = "colour" if is_shape and rng.random() < 0.5 else "where"
    text = _phrase(kind, language, rng, o=missing)
    return text, f"there is no {missing}" if language == "en" else f"没有{missing}"


_ASK: dict[str, Callable[..., Question | None]] = {
    "shape": partial(_attribute, asked="shape", given="colour"),
    "colour": partial(_attribute, asked="colour", given="shape"),
    "count": _count, "where": _where, "place": _place,
    "larger": _larger, "exists": _exists, "absent": _absent,
}  # fmt: skip
