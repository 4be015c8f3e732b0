"""What the tests of simulated cards share: small models in a directory, and counters to compare."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import glm4v_nb  # noqa: F401

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint"
OFFICIAL = "zai-org/glm-4v-9b"
GIB, MIB = 2**30, 2**20


def write_config(directory: Path, **changes) -> Path:
    """The tiny golden configuration with some values changed, as a directory to load from inside a
    rig."""
    config = json.loads((GOLDEN / "config.json").read_text())
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config | changes))
    return directory


def load(source=GOLDEN, device_map="auto", dtype=torch.bfloat16, **arguments):
    """As a reader's notebook loads a model; call it inside ``with rig:``."""
    return AutoModelForCausalLM.from_pretrained(
        str(source), device_map=device_map, dtype=dtype, **arguments
    )


def split_in_two(model_layers=3):
    """A device map that puts the tower and half the decoder on card 0, the rest on card 1."""
    layers = {
        f"language_model.layers.{index}": int(index >= model_layers // 2)
        for index in range(model_layers)
    }
    return {
        "vision_tower": 0,
        "language_model.embed_tokens": 0,
        **layers,
        "language_model.norm": 1,
        "language_model.rotary_emb": 1,
        "lm_head": 1,
    }


def counters(rig) -> list[tuple[int, int, int, int]]:
    """Allocated, peak allocated, reserved and peak reserved bytes of every card."""
    return [
        (
            card.allocated_bytes,
            card.peak_allocated_bytes,
            card.reserved_bytes,
            card.peak_reserved_bytes,
        )
        for card in rig.memory()
    ]
