"""The scenes that ship with the miniature: a few pictures to try.

The rules for drawing others that it understands are in the repository's ``tools/miniature``.
"""

from pathlib import Path

from PIL import Image

# Pictures and questions that training never saw; `python -m tools.miniature.examples` draws them.
EXAMPLES = Path(__file__).parent / "examples"
SAMPLES = ("Five shapes", "Three shapes", "Two shapes", "One shape")


def sample_pictures() -> dict[str, Image.Image]:
    """A few pictures to try, by name, RGB of 320 × 240 pixels."""
    files = {name: EXAMPLES / f"{name.lower().replace(' ', '_')}.png" for name in SAMPLES}
    return {name: Image.open(file).convert("RGB") for name, file in files.items()}
