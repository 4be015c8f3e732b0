"""Scenes of simple shapes, drawn with Pillow.

The rules, for anyone who wants to draw a picture that the miniature should understand:

* One to five filled shapes of the kinds in ``SHAPES``, which do not touch, on a plain, graded or
  textured background that contrasts with every one of them. A square stands on a side, a diamond on
  a corner.
* Each has one of the colours in ``COLOURS``, within a small distance of the listed RGB values.
* The picture is divided into 3 × 3 equal cells; a shape's centre lies well inside one, at most one
  shape a cell.
* A large shape has a radius of 12 to 16.5 % of the shorter side, a small one 7 to 9 %. A shape
  alone in the picture may be larger.
* Any size from about 80 pixels a side, noise up to a standard deviation of about 12, any file
  format Pillow reads, JPEG down to a quality of about 40.
* Sides up to 4 : 1. The model sees every picture squeezed into a square, so beyond 2 : 1 every
  shape is large.
* A grey picture is one whose shapes are black, white and grey.
"""

import io
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

_DATA = tomllib.loads(Path(__file__).with_name("scenes.toml").read_text(encoding="utf-8"))
COLOURS: dict[str, list[list[int]]] = _DATA["colours"]
TILT: dict[str, int] = _DATA["tilt"]
SHAPES, CELLS = tuple(TILT), tuple(_DATA["cells"])
LARGE, SMALL, ALONE = (0.12, 0.165), (0.07, 0.09), (0.08, 0.33)
WIDE = 2.0  # sides from which on small shapes would lose their form
NEUTRAL = ("black", "white", "grey")
SUPERSAMPLING = 3
# Drawn once and read at random offsets, which is many times faster than drawing it anew.
_NOISE = np.random.default_rng(0).standard_normal(1_500_000, dtype=np.float32)


@dataclass(frozen=True)
class Shape:
    """One object. ``x``, ``y`` are fractions of width and height, ``radius`` of the shorter side;
    ``tilt`` is in radians, ``width`` the horizontal stretch of a diamond."""

    shape: str
    colour: str
    rgb: tuple[int, int, int]
    cell: int
    x: float
    y: float
    radius: float
    tilt: float = 0.0
    width: float = 1.0


@dataclass(frozen=True)
class Scene:
    """Objects in reading order of their cells, and what the background needs to be drawn again."""

    objects: tuple[Shape, ...]
    background: tuple[tuple[int, int, int], tuple[int, int, int]]
    pattern: str
    noise: float
    seed: int


def random_scene(rng, count: int | None = None, wide: bool = False, grey: bool = False) -> Scene:
    """A scene that follows the rules above; the same ``rng`` state gives the same scene.

    ``count`` of objects, 1 to 5, is drawn if not given. A ``wide`` picture has sides beyond 2 : 1
    and only large shapes, a ``grey`` one only black, white and grey.
    """
    count = count or int(rng.choice(5, p=(0.22, 0.2, 0.2, 0.19, 0.19))) + 1
    colours = NEUTRAL if grey else tuple(COLOURS)
    objects: list[Shape] = []
    while len(objects) < count:
        cell = int(rng.integers(9))
        alone = count == 1
        radii = ALONE if alone else LARGE if wide or rng.random() < 0.5 else SMALL
        radius = float(rng.uniform(*radii))
        x = (cell % 3 + 0.5) / 3 + rng.uniform(-0.1, 0.1)
        y = (cell // 3 + 0.5) / 3 + rng.uniform(-0.1, 0.1)
        room = min(x, y, 1 - x, 1 - y)
        if alone:
            radius = max(LARGE[0] if wide else 0.075, min(radius, room + 0.01))
        elif radius > room + 0.01:
            continue
        if any(_too_close(other, cell, x, y, radius) for other in objects):
            continue
        # Repeated kinds and colours make the counting questions interesting.
        repeat = objects and rng.random() < 0.3
        shape = objects[-1].shape if repeat else str(rng.choice(SHAPES))
        colour = objects[-1].colour if objects and rng.random() < 0.2 else str(rng.choice(colours))
        rgb = _shade(colour, rng)
        tilt = math.radians(rng.uniform(-1, 1) * TILT[shape] * (rng.random() < 0.7))
        width = float(rng.uniform(0.65, 1.0)) if shape == "diamond" else 1.0
        objects.append(Shape(shape, colour, rgb, cell, float(x), float(y), radius, tilt, width))
    objects.sort(key=lambda one: one.cell)
    colours_used = [one.rgb for one in objects]
    first = second = _background(colours_used, rng, grey)
    pattern = str(rng.choice(("plain", "gradient", "texture"), p=(0.5, 0.25, 0.25)))
    for _ in range(8):
        candidate = _rgb(np.array(first) + rng.integers(-60, 61, 1 if grey else 3))
        if pattern != "plain" and _contrasts(candidate, colours_used):
            second = candidate
            break
    noise = float(rng.uniform(1, 12)) if rng.random() < 0.5 else 0.0
    return Scene(tuple(objects), (first, second), pattern, noise, int(rng.integers(2**31)))


def random_size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height in pixels: 80 to 400 each, mostly near square, one in eight beyond 2 : 1."""
    side = 80 * 4 ** rng.random()
    octaves = rng.choice((0.5, 1.0, 2.0), p=(0.55, 0.2, 0.25))
    ratio = 2 ** rng.uniform(-octaves, octaves)
    return tuple(int(np.clip(side * r, 80, 400)) for r in (math.sqrt(ratio), 1 / math.sqrt(ratio)))


def is_wide(size: tuple[int, int]) -> bool:
    """Whether the sides are so unequal that every shape has to be large."""
    return max(size) > WIDE * min(size)


def draw(scene: Scene, size: tuple[int, int]) -> Image.Image:
    """The RGB picture of a scene; ``size`` is (width, height) in pixels."""
    width, height = size
    rng = np.random.default_rng(scene.seed)
    image = Image.fromarray(_paint_background(scene, width, height, rng))
    for one in scene.objects:
        _paint(image, one)
    if scene.noise:
        pixels = np.asarray(image, dtype=np.float32)
        if pixels.size < len(_NOISE):
            offset = rng.integers(0, len(_NOISE) - pixels.size)
            noise = _NOISE[offset : offset + pixels.size].reshape(pixels.shape)
        else:
            noise = rng.standard_normal(pixels.shape, dtype=np.float32)
        pixels = pixels + scene.noise * noise
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return image


def encode(picture: Image.Image, format: str, **options) -> bytes:
    """The bytes of an image file: ``encode(picture, "JPEG", quality=60)``."""
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def _paint_background(scene: Scene, width: int, height: int, rng) -> np.ndarray:
    first, second = (np.array(colour, np.float32) for colour in scene.background)
    if scene.pattern == "plain":
        return np.full((height, width, 3), first, np.uint8)
    if scene.pattern == "gradient":
        angle = rng.uniform(0, 2 * math.pi)
        across = np.cos(angle) * np.linspace(-0.5, 0.5, width, dtype=np.float32)[None, :]
        down = np.sin(angle) * np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None]
        mix = (across + down) / math.sqrt(2) + 0.5
    else:
        kind = rng.integers(3)
        step = max(3, int(min(width, height) * rng.uniform(0.03, 0.1)))
        columns, rows = np.arange(width)[None, :], np.arange(height)[:, None]
        if kind == 0:  # stripes
            mix = ((columns + rows * rng.integers(-1, 2)) // step % 2).astype(np.float32)
            mix = np.broadcast_to(mix, (height, width)) * 0.6
        elif kind == 1:  # checks
            mix = ((columns // step + rows // step) % 2).astype(np.float32) * 0.6
        else:  # clouds
            coarse = Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8))
            clouds = coarse.resize((width, height), Image.Resampling.BICUBIC)
            mix = np.asarray(clouds, np.float32) / 255
    return (first + mix[..., None] * (second - first)).clip(0, 255).astype(np.uint8)


def _paint(image: Image.Image, one: Shape) -> None:
    """Draw one shape with smooth edges, through a mask drawn larger and scaled down."""
    width, height = image.size
    radius = one.radius * min(width, height)
    left, top = int(one.x * width - radius) - 2, int(one.y * height - radius) - 2
    side = int(2 * radius) + 5
    mask = Image.new("L", (side * SUPERSAMPLING,) * 2)
    x, y = (one.x * width - left) * SUPERSAMPLING, (one.y * height - top) * SUPERSAMPLING
    pen = ImageDraw.Draw(mask)
    radius *= SUPERSAMPLING
    if one.shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    else:
        cosine, sine = math.cos(one.tilt), math.sin(one.tilt)
        corners = [(a * one.width, b) for a, b in _OUTLINES[one.shape]]
        turned = [(cosine * a - sine * b, sine * a + cosine * b) for a, b in corners]
        pen.polygon([(x + radius * a, y + radius * b) for a, b in turned], fill=255)
    image.paste(one.rgb, (left, top), mask.reduce(SUPERSAMPLING))


def _polar(radii: tuple[float, ...]) -> list[tuple[float, float]]:
    """Points at these distances from the centre, at equal angles, the first at the top."""
    angles = [math.radians(-90 + 360 * index / len(radii)) for index in range(len(radii))]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _heart() -> list[tuple[float, float]]:
    """The curve x = 16 sin³ t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, scaled."""
    points = []
    for t in [2 * math.pi * index / 40 for index in range(40)]:
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((math.sin(t) ** 3 * 0.95, -y / 17))
    return points


_OUTLINES = _DATA["outlines"] | {
    "star": _polar((1.0, 0.42) * 5),
    "diamond": _polar((1.0,) * 4),
    "heart": _heart(),
}


def _too_close(other: Shape, cell: int, x: float, y: float, radius: float) -> bool:
    return other.cell == cell or math.hypot(other.x - x, other.y - y) < other.radius + radius + 0.02


def _shade(colour: str, rng: np.random.Generator) -> tuple[int, int, int]:
    anchors = np.array(COLOURS[colour])
    first, second = anchors[rng.integers(len(anchors), size=2)]
    mixed = first + rng.random() * (second - first)
    channels = 1 if colour in NEUTRAL else 3
    return _rgb(mixed + rng.uniform(-10, 10, channels) * (rng.random() < 0.6))


def _rgb(values) -> tuple[int, int, int]:
    return tuple(int(value) for value in np.clip(values, 0, 255))


def _contrasts(background, colours) -> bool:
    distances = np.abs(np.array(colours) - np.array(background)).sum(axis=1)
    return bool((distances > 160).all())


def _background(colours, rng: np.random.Generator, grey: bool) -> tuple[int, int, int]:
    def drawn(low: int, *shape: int) -> np.ndarray:
        values = rng.integers(low, 256, (*shape, 1 if grey else 3))
        return np.broadcast_to(values, (*shape, 3))

    for _ in range(200):
        style = rng.random()
        if style < 0.35:
            candidate = (255, 255, 255) if style < 0.25 else (0, 0, 0)
        else:
            candidate = _rgb(drawn(190 if style < 0.65 else 0))
        if _contrasts(candidate, colours):
            return candidate
    # Five colours can leave little room: take the best of many.
    candidates = drawn(0, 200)
    distances = np.abs(candidates[:, None] - np.array(colours)[None]).sum(-1).min(1)
    return _rgb(candidates[distances.argmax()])
