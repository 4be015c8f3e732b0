"""The question grammar: English and Chinese questions about a scene, each with its one exact
answer.

Kinds (the phrasings are ``QUESTIONS``; {c} is a colour, {s} a shape, {p} a place; an *object* is
described by shape, by colour or by both, and only questions with exactly one right answer are
asked):

========= ================================================ =====================================
kind      question, for example                            answer =========
================================================ ===================================== shape
What shape is the red object?                    circle colour    What colour is the circle?
red count     How many objects / circles / red objects …?      3 (0 if there is none) where
Where is the red circle?                         top left (one of the nine cells) place     What is
at the top left?                         red circle, or: nothing larger    Which is larger, the red
circle or the …?        red circle (radii differ by a quarter) exists    Is there a red circle?
yes / no absent    What colour is / where is the star? (none)       there is no star describe
Describe the picture.                            a red circle at the top left, a … (reading order)
========= ================================================ =====================================
"""

from collections.abc import Callable

import numpy as np

from glm4v_nb.miniature.scenes import CELLS, COLOURS, SHAPES, Scene, Shape, random_scene

LANGUAGES = ("en", "zh")
SHAPES_ZH = dict(
    zip(SHAPES, ("圆形", "正方形", "三角形", "星形", "菱形", "十字形", "心形"), strict=True)
)
COLOURS_ZH = dict(
    zip(
        COLOURS,
        ("红色", "绿色", "蓝色", "黄色", "橙色", "紫色", "粉色", "棕色", "黑色", "白色", "灰色"),
        strict=True,
    )
)
CELLS_ZH = dict(
    zip(
        CELLS,
        ("左上角", "上方", "右上角", "左边", "中间", "右边", "左下角", "下方", "右下角"),
        strict=True,
    )
)
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
QUESTIONS = {
    "shape": {
        "en": (
            "What shape is the {c} object?",
            "What is the shape of the {c} object?",
            "Which shape is {c}?",
        ),
        "zh": ("{c}的物体是什么形状？", "{c}物体的形状是什么？", "什么形状是{c}的？"),
    },
    "shape_alone": {
        "en": ("What shape is this?", "What shape is the object?", "What shape is it?"),
        "zh": ("这是什么形状？", "图中是什么形状？", "物体是什么形状？"),
    },
    "colour": {
        "en": (
            "What colour is the {s}?",
            "What color is the {s}?",
            "Which colour does the {s} have?",
        ),
        "zh": ("{s}是什么颜色？", "{s}的颜色是什么？", "图中的{s}是什么颜色的？"),
    },
    "colour_alone": {
        "en": ("What colour is this?", "What color is the object?", "What colour is it?"),
        "zh": ("这是什么颜色？", "物体是什么颜色？", "图中的物体是什么颜色？"),
    },
    "count": {
        "en": ("How many {o} are there?", "How many {o} are in the picture?", "Count the {o}."),
        "zh": ("有几个{o}？", "图中有多少个{o}？", "数一数{o}有几个。"),
    },
    "where": {
        "en": ("Where is the {o}?", "Where in the picture is the {o}?"),
        "zh": ("{o}在哪里？", "{o}在图中的什么位置？"),
    },
    "place": {
        "en": ("What is {p}?", "What do you see {p}?"),
        "zh": ("{p}有什么？", "图的{p}是什么？"),
    },
    "larger": {
        "en": ("Which is larger, the {o} or the {q}?", "Which is bigger, the {o} or the {q}?"),
        "zh": ("{o}和{q}哪个更大？", "哪个更大，{o}还是{q}？"),
    },
    "exists": {
        "en": ("Is there a {o}?", "Is there a {o} in the picture?", "Do you see a {o}?"),
        "zh": ("有{o}吗？", "图中有没有{o}？", "图中有{o}吗？"),
    },
    "describe": {
        "en": (
            "Describe the picture.",
            "Describe the image.",
            "What is in the picture?",
            "What do you see?",
        ),
        "zh": ("描述这张图片。", "请描述图片。", "图中有什么？", "你看到了什么？"),
    },
}
KINDS = ("shape", "colour", "count", "where", "place", "larger", "exists", "absent", "describe")
Question = tuple[str, str]


def sample(
    rng: np.random.Generator, wide: bool = False, grey: bool = False
) -> tuple[Scene, str, str, str, str]:
    """A random scene and question: (scene, question, answer, kind, language). See
    ``random_scene``."""
    kind = str(rng.choice(KINDS))
    language = str(rng.choice(LANGUAGES))
    while True:
        scene = random_scene(rng, wide=wide, grey=grey)
        found = ask(scene, kind, language, rng)
        if found:
            return scene, *found, kind, language


def ask(scene: Scene, kind: str, language: str, rng: np.random.Generator) -> Question | None:
    """A question of this kind about this scene with its answer, or None if the scene allows
    none."""
    return _ASK[kind](scene.objects, language, rng)


def name(language: str, shape: str | None = None, colour: str | None = None) -> str:
    """ "red circle", "circle" or "red object" in the language."""
    if language == "en":
        return " ".join(part for part in (colour, shape or "object") if part)
    if colour is None:
        return SHAPES_ZH[shape]
    return f"{COLOURS_ZH[colour]}的{SHAPES_ZH[shape] if shape else '物体'}"


def describe(objects: tuple[Shape, ...], language: str) -> str:
    """The fixed form of a description, objects in reading order."""
    if language == "en":
        return ", ".join(
            f"{_article(one.colour)} {one.colour} {one.shape} {_at(one.cell)}" for one in objects
        )
    return "，".join(
        f"{CELLS_ZH[CELLS[one.cell]]}有一个{name('zh', one.shape, one.colour)}" for one in objects
    )


def _article(word: str) -> str:
    return "an" if word == "orange" else "a"


def _at(cell: int) -> str:
    place = CELLS[cell]
    if place == "centre":
        return "in the centre"
    return f"on the {place}" if place in ("left", "right") else f"at the {place}"


def _phrase(kind: str, language: str, rng: np.random.Generator, **parts: str) -> str:
    forms = QUESTIONS[kind][language]
    text = forms[rng.integers(len(forms))].format(**parts)
    # People leave the question mark out, and the capital.
    if rng.random() < 0.1:
        text = text.rstrip("?.？。")
    if rng.random() < 0.1:
        text = text[0].lower() + text[1:]
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


def _shape(objects, language, rng) -> Question | None:
    if len(objects) == 1 and rng.random() < 0.3:
        text, one = _phrase("shape_alone", language, rng), objects[0]
    else:
        colours = [one.colour for one in objects]
        one = _pick([one for one in objects if colours.count(one.colour) == 1], rng)
        if one is None:
            return None
        colour = one.colour if language == "en" else COLOURS_ZH[one.colour]
        text = _phrase("shape", language, rng, c=colour)
    return text, one.shape if language == "en" else SHAPES_ZH[one.shape]


def _colour(objects, language, rng) -> Question | None:
    if len(objects) == 1 and rng.random() < 0.3:
        text, one = _phrase("colour_alone", language, rng), objects[0]
    else:
        shapes = [one.shape for one in objects]
        one = _pick([one for one in objects if shapes.count(one.shape) == 1], rng)
        if one is None:
            return None
        text = _phrase("colour", language, rng, s=name(language, one.shape))
    return text, one.colour if language == "en" else COLOURS_ZH[one.colour]


def _count(objects, language, rng) -> Question:
    choice = rng.integers(3)
    target = _pick(objects, rng) if rng.random() < 0.8 else None
    shape = target.shape if target else str(rng.choice(SHAPES))
    colour = target.colour if target else str(rng.choice(list(COLOURS)))
    if choice == 0:
        number, what = (
            len(objects),
            {"en": _pick(("objects", "shapes"), rng), "zh": "物体"}[language],
        )
    elif choice == 1:
        number = sum(one.shape == shape for one in objects)
        what = PLURALS[shape] if language == "en" else SHAPES_ZH[shape]
    else:
        number = sum(one.colour == colour for one in objects)
        what = f"{colour} objects" if language == "en" else name("zh", None, colour)
    return _phrase("count", language, rng, o=what), str(number)


def _where(objects, language, rng) -> Question | None:
    found = _pick(_unique_names(objects, language), rng)
    if found is None:
        return None
    place = CELLS[found[0].cell]
    return _phrase("where", language, rng, o=found[1]), (
        place if language == "en" else CELLS_ZH[place]
    )


def _place(objects, language, rng) -> Question:
    cells = {one.cell: one for one in objects}
    cell = _pick(list(cells), rng) if rng.random() < 0.75 else int(rng.integers(9))
    text = _phrase(
        "place", language, rng, p=_at(cell) if language == "en" else CELLS_ZH[CELLS[cell]]
    )
    if cell not in cells:
        return text, "nothing" if language == "en" else "什么都没有"
    return text, name(language, cells[cell].shape, cells[cell].colour)


def _larger(objects, language, rng) -> Question | None:
    names = _unique_names(objects, language)
    pairs = [
        (a, b) for a in names for b in names
        if a[0].radius > 1.25 * b[0].radius and "object" not in a[1] + b[1] and "物体" not in a[1] + b[1]
    ]  # fmt: skip
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
    return _phrase("exists", language, rng, o=name(language, shape, colour)), (
        "yes" if language == "en" else "有"
    )


def _absent(objects, language, rng) -> Question:
    missing = _absent_name(objects, language, rng)
    shapes = SHAPES if language == "en" else SHAPES_ZH.values()
    if missing in shapes and rng.random() < 0.5:
        text = _phrase("colour", language, rng, s=missing)
    else:
        text = _phrase("where", language, rng, o=missing)
    return text, f"there is no {missing}" if language == "en" else f"没有{missing}"


def _describe(objects, language, rng) -> Question:
    return _phrase("describe", language, rng), describe(objects, language)


_ASK: dict[str, Callable[..., Question | None]] = {
    "shape": _shape, "colour": _colour, "count": _count, "where": _where, "place": _place,
    "larger": _larger, "exists": _exists, "absent": _absent, "describe": _describe,
}  # fmt: skip
