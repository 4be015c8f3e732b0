"""Device maps of GLM-4V-9B: what transformers plans, and what a map means in bytes."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from glm4v_nb.model import GLM4VForConditionalGeneration
from glm4v_nb.model.configuration import OFFICIAL, read_config
from simgpu import placement
from simgpu.placement import Place, input_device, place_of

__all__ = [
    "Place",
    "PlacedModule",
    "explain_device_map",
    "input_device",
    "meta_model",
    "place_of",
    "plan_device_map",
]


@dataclass(frozen=True)
class PlacedModule:
    """One unit of the model as a device map sees it. ``bytes`` counts its parameters."""

    name: str
    kind: str
    place: Place
    bytes: int


def meta_model(
    dtype: torch.dtype = torch.bfloat16, checkpoint: str | Path = OFFICIAL
) -> GLM4VForConditionalGeneration:
    """The model without memory, for planning; ``checkpoint`` as in ``read_config``."""
    return placement.meta_model(GLM4VForConditionalGeneration, read_config(checkpoint), dtype)


def plan_device_map(
    strategy: str,
    max_memory: dict[Place, int | str],
    dtype: torch.dtype = torch.bfloat16,
    checkpoint: str | Path = OFFICIAL,
) -> dict[str, Place]:
    """As ``simgpu.placement.plan_device_map``; ``checkpoint`` as in ``read_config``, which raises
    ValueError."""
    return placement.plan_device_map(meta_model(dtype, checkpoint), strategy, max_memory)


def explain_device_map(model, device_map: dict[str, Place]) -> list[PlacedModule]:
    """The model's building blocks in the order data flows, each with its place and bytes.

    A block that the map cuts in two appears once per part.
    """
    tower, decoder = "vision_tower", "language_model"
    kinds = [
        (f"{tower}.patch_embedding", "tower other"),
        *[(f"{tower}.layers.{n}", "tower layer") for n in range(len(model.vision_tower.layers))],
        *[(f"{tower}.{name}", "tower other") for name in ("conv", "linear_proj", "boundary")],
        (f"{decoder}.embed_tokens", "embedding and head"),
        *[(f"{decoder}.layers.{n}", "decoder layer") for n in range(model.config.num_layers)],
        (f"{decoder}.norm", "embedding and head"),
        ("lm_head", "embedding and head"),
    ]
    placed = []
    for block, kind in kinds:
        sizes: Counter[Place] = Counter()
        for name, parameter in model.get_submodule(block).named_parameters():
            sizes[place_of(f"{block}.{name}", device_map)] += parameter.nbytes
        placed += [PlacedModule(block, kind, place, size) for place, size in sizes.items()]
    return placed
