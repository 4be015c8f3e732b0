"""What simulated cards need of a checkpoint: its configuration, and which file holds which tensor.

A package that brings the configuration of a model registers it here, under the names by which the
model's users load it. Importing this module imports no torch and no transformers.
"""

import json
from collections.abc import Callable
from pathlib import Path

INDEX = "model.safetensors.index.json"
_CONFIGS: dict[str, Callable[[], object]] = {}


def register_config(checkpoint: str, make: Callable[[], object]):
    """Let simulated cards load a checkpoint by name, such as a hub id, without a download.

    ``make`` is called without arguments for a new ``PreTrainedConfig`` of transformers.
    """
    _CONFIGS[checkpoint] = make


def known_config(checkpoint: str):
    """The configuration registered for a checkpoint, or None."""
    return _CONFIGS[checkpoint]() if checkpoint in _CONFIGS else None


def weight_map(directory: Path) -> dict[str, str]:
    """The file of every tensor of a checkpoint that has an index; {} for any other.

    Raises:
        ValueError: the index is damaged.
    """
    index = directory / INDEX
    if not index.is_file():
        return {}
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"].items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is not a safetensors index ({error!r}): expected JSON with a"
            ' "weight_map". Download the file again.'
        ) from error
