"""Device maps: what transformers plans for given cards, and what a map means in bytes."""

import difflib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.integrations.accelerate import _get_device_map

from glm4v_nb.model import GLM4VForConditionalGeneration
from glm4v_nb.model.configuration import OFFICIAL, read_config

# Where a module runs: a card's index, "cpu" or "disk".
Place = int | str


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
    with torch.device("meta"):
        return GLM4VForConditionalGeneration(read_config(checkpoint)).to(dtype)


def plan_device_map(
    strategy: str,
    max_memory: dict[Place, int | str],
    dtype: torch.dtype = torch.bfloat16,
    checkpoint: str | Path = OFFICIAL,
) -> dict[str, Place]:
    """The map that ``from_pretrained`` would make of a strategy, without loading.

    ``strategy`` is "auto", "balanced", "balanced_low_0" or "sequential"; ``max_memory`` bytes per
    card index, and for "cpu"; ``checkpoint`` as in ``read_config``, which raises ValueError.
    """
    return dict(_get_device_map(meta_model(dtype, checkpoint), strategy, max_memory, None))


def check_device_map(device_map: dict[str, Place], count: int, checkpoint: str | Path = OFFICIAL):
    """Check a map written by hand for ``count`` cards, with the names here.

    Raises:
        ValueError: a place that is neither one of the cards nor "cpu", a name the model does not
            have, a parameter without a place, "" beside other names, or a module inside another
            one that has another place.
    """
    for name, place in device_map.items():
        is_card = isinstance(place, int) and not isinstance(place, bool) and 0 <= place < count
        if not is_card and place != "cpu":
            raise ValueError(
                f"device_map puts {name!r} on {place!r}; expected a card's number, 0 to"
                f' {count - 1}, or "cpu". Correct the place, or take more cards.'
            )
    if "" in device_map and len(device_map) > 1:
        raise ValueError(
            'device_map has "" beside other names. "" is the whole model, and accelerate would put'
            ' all of it there first. Give "" alone, or name every module.'
        )
    model = meta_model(checkpoint=checkpoint)
    parameters = [name for name, _ in model.named_parameters()]
    known = {name for name, _ in model.named_modules()}
    for name in [name for name in device_map if name not in known]:
        advice = "The top ones are vision_tower, language_model, lm_head."
        for close in difflib.get_close_matches(name, known, n=1):
            advice = f"Did you mean {close!r}?"
        raise ValueError(f"device_map names {name!r}, which the model does not have. {advice}")
    for name, place in device_map.items():
        outer = next((one for one in device_map if name.startswith(f"{one}.")), name)
        if device_map[outer] != place:
            raise ValueError(
                f"device_map puts {name!r} on {place!r}, inside {outer!r} on {device_map[outer]!r}."
                " accelerate would put all of the outer one there first. Instead of it name the"
                " modules it is made of, or leave out the inner one."
            )
    prefixes = tuple(f"{name}." for name in device_map)
    for name in parameters:
        if "" not in device_map and not f"{name}.".startswith(prefixes):
            raise ValueError(
                f"device_map gives no place to {name}; expected one for every parameter. Add the"
                " module it belongs to."
            )


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


def place_of(name: str, device_map: dict[str, Place]) -> Place:
    """Where a parameter or module is, by the longest prefix in the map; else "cpu"."""
    while name not in device_map and name:
        name = name.rpartition(".")[0]
    place = device_map.get(name, "cpu")
    return place.index if isinstance(place, torch.device) and place.index is not None else place


def input_device(model) -> torch.device:
    """Where token ids belong: the device the embedding computes on, offloaded or not."""
    embedding = model.get_input_embeddings()
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    if device is None:
        return embedding.weight.device
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
