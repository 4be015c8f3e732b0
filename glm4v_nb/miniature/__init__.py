"""The miniature: GLM-4V's architecture, trained here to answer questions about simple pictures."""

from pathlib import Path

# The trained checkpoint that ships with this package, in the official layout.
CHECKPOINT = Path(__file__).parent / "checkpoint"
