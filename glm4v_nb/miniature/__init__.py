"""The miniature: GLM-4V's architecture, trained here to answer questions about simple pictures.

What it was trained on stands beside its trainer, in the repository's ``tools/miniature``;
``scenes.py`` there has the rules for drawing a picture that it understands.
"""

from pathlib import Path

from PIL import Image

# The trained checkpoint that ships with this package, in the official layout.
CHECKPOINT = Path(__file__).parent / "checkpoint"
# Pictures and questions that training never saw; `python -m tools.miniature.examples` draws them.
EXAMPLES = Path(__file__).parent / "examples"
SAMPLES = ("Five shapes", "Three shapes", "Two shapes", "One shape")


def sample_pictures() -> dict[str, Image.Image]:
    """A few pictures to try, by name, RGB of 320 × 240 pixels."""
    files = {name: EXAMPLES / f"{name.lower().replace(' ', '_')}.png" for name in SAMPLES}
    return {name: Image.open(file).convert("RGB") for name, file in files.items()}
