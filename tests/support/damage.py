"""Ways to damage a checkpoint, and how its refusal reads."""

import json
import struct

import pytest
from safetensors.torch import load_file, save_file

from glm4v_nb.inference import load

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FUSED = "transformer.encoder.layers.0.self_attention.query_key_value.weight"


def forbidden(*args, **kwargs):
    pytest.fail("asked a question, read a pickle or fetched code")


def refusal(directory, error=(ValueError, FileNotFoundError)) -> str:
    with pytest.raises(error) as raised:
        load(directory)
    message = str(raised.value)
    assert "\n" not in message and len(message) < 700, message
    return message


def edited(file, part=None, **values):
    """Change keys of a JSON file, of an object inside it if ``part`` is given; make the file."""

    def damage(folder):
        path = folder / file
        content = json.loads(path.read_text()) if path.exists() else {}
        (content[part] if part else content).update(values)
        path.write_text(json.dumps(content))

    return damage


def written(file, content):
    return lambda folder: (folder / file).write_bytes(content)


def replaced(file, make):
    """Something else in place of the file, made by ``make(path)``."""

    def damage(folder):
        (folder / file).unlink(missing_ok=True)
        make(folder / file)

    return damage


def vision(**values):
    return edited("config.json", "vision_config", **values)


def indexed(shard, **more):
    """An index that places every tensor in ``shard``."""

    def damage(folder):
        places = dict.fromkeys(load_file(folder / WEIGHTS), shard)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places | more}))

    return damage


def weights(change):
    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        save_file(change(tensors) or tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def header(change):
    """Rewrite the JSON header of the weights, its length and the data left as they are."""

    def damage(folder):
        content = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        text = change(json.loads(content[8 : 8 + length]))
        text = json.dumps(text).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return damage


def first_tensor(**values):
    return header(lambda found: {**found, FUSED: found[FUSED] | values})


class Runs:
    """Code, to a reader of pickles."""

    def __reduce__(self):
        return forbidden, ()
