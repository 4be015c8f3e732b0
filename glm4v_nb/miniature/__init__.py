"""The miniature: GLM-4V's architecture, trained here to answer questions about simple pictures.

What it was trained on stands beside its trainer, in the repository's ``tools/miniature``.
"""

from pathlib import Path

from glm4v_nb.miniature.scenes import EXAMPLES, SAMPLES, sample_pictures

__all__ = ["CHECKPOINT", "EXAMPLES", "SAMPLES", "sample_pictures"]

# The trained checkpoint that ships with this package, in the official layout.
CHECKPOINT = Path(__file__).parent / "checkpoint"
