"""What simulated cards need of a checkpoint: its configuration, and which file holds which tensor.

A package that brings the configuration of a model registers it here, under the names by which the
model's users load it. Importing this module imports no torch and no transformers.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

INDEX = "model.safetensors.index.json"
_MOST_JSON_BYTES = 64 * 2**20
_CONFIGS: dict[str, Callable[[], object]] = {}
_RECIPES: dict[str, Callable[[object], object]] = {}


def register_config(checkpoint: str, make: Callable[[], object]):
    """Let simulated cards load a checkpoint by name, such as a hub id, without a download.

    ``make`` is called without arguments for a new ``PreTrainedConfig`` of transformers.
    """
    _CONFIGS[checkpoint] = make


def known_config(checkpoint: str):
    """The configuration registered for a checkpoint, or None."""
    return _CONFIGS[checkpoint]() if checkpoint in _CONFIGS else None


def register_recipe(model_type: str, make: Callable[[object], object]):
    """Let ``fit`` run models of a type otherwise than the general ``recipes.Recipe`` does.

    ``make`` is given the configuration and returns a ``Recipe``.
    """
    _RECIPES[model_type] = make


def known_recipe(model_type: str):
    """What makes the recipe registered for a type of model, or None."""
    return _RECIPES.get(model_type)


def file_in(directory: Path, name: str) -> Path:
    """A file of a checkpoint's directory, or where it would be.

    Links may lead to other files of the directory, and from a snapshot in the cache of the Hugging
    Face hub to its blobs.

    Raises:
        ValueError: it leads out of the directory, or is there and no plain file.
    """
    path = directory / name
    home, target = Path(os.path.realpath(directory)), Path(os.path.realpath(path))
    blobs = [parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots"]
    if not any(target.is_relative_to(root) for root in (home, *blobs)):
        raise ValueError(
            f"{path} leads to {target}, outside the checkpoint's directory. Expected a file of the"
            " directory itself. Copy the file there."
        )
    if os.path.lexists(path) and not path.is_file():
        raise ValueError(
            f"{path} is no plain file, but a directory, a pipe or a broken link. Delete it, or"
            " download the file again."
        )
    return path


def read_json(path: Path, kind: str = "a JSON object") -> dict:
    """The object in a JSON file; ``kind`` says in the error what was expected.

    Raises:
        ValueError: the file cannot be read, is larger than 64 MiB, or is no such JSON.
    """
    try:
        if path.stat().st_size > _MOST_JSON_BYTES:
            raise ValueError(f"more than {_MOST_JSON_BYTES:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        reason = f"a {type(content).__name__}"
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error)
    raise ValueError(f"{path} is not {kind} ({reason}). Download the file again.")


def weight_map(directory: Path) -> dict[str, str]:
    """The file of every tensor of a checkpoint that has an index; {} for any other.

    Raises:
        ValueError: the index is damaged, or names what is no safetensors file of the directory.
    """
    if not file_in(directory, INDEX).is_file():
        return {}
    index, kind = directory / INDEX, 'a safetensors index: JSON with a "weight_map" of file names'
    places = read_json(index, kind).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{index} is not {kind}. Download the file again.")
    for file in set(places.values()):
        path = Path(file)
        if path.is_absolute() or path.suffix != ".safetensors" or not file.isprintable():
            raise ValueError(
                f"{index} places tensors in {file!r}. Expected names of .safetensors files beside"
                " it: any other may be a pickle, which can run any code when loaded. Download the"
                " safetensors files of the checkpoint and their index."
            )
        file_in(directory, file)
    return places
