"""Device maps: what transformers plans for given cards, and whether one of your own is whole."""

import difflib
from collections import Counter

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.accelerate import _get_device_map

# Where a module runs: a card's index, "cpu" or "disk".
Place = int | str


def meta_model(
    model_class: type, config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """A model without memory, for planning."""
    with torch.device("meta"):
        return model_class(config).to(dtype)


def plan_device_map(
    model: PreTrainedModel, strategy: str, max_memory: dict[Place, int | str]
) -> dict[str, Place]:
    """The map that ``from_pretrained`` would make of a strategy for a ``meta_model``.

    ``strategy`` is "auto", "balanced", "balanced_low_0" or "sequential"; ``max_memory`` bytes per
    card index, and for "cpu".
    """
    return dict(_get_device_map(model, strategy, max_memory, None))


def check_device_map(device_map: dict[str, Place], count: int, model: PreTrainedModel):
    """Check a map written by hand for ``count`` cards and a model, of which names are enough.

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
    parameters = [name for name, _ in model.named_parameters()]
    known = {name for name, _ in model.named_modules()}
    for name in [name for name in device_map if name not in known]:
        top = ", ".join(name for name, _ in model.named_children())
        advice = f"The top ones are {top}."
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


def bytes_by_place(model: PreTrainedModel, device_map: dict[str, Place]) -> Counter[Place]:
    """Bytes of a model's weights in every place of a map."""
    sizes: Counter[Place] = Counter()
    for name, weight in model.named_parameters():
        sizes[place_of(name, device_map)] += weight.nbytes
    return sizes


def place_of(name: str, device_map: dict[str, Place]) -> Place:
    """Where a parameter or module is, by the longest prefix in the map; else "cpu"."""
    while name not in device_map and name:
        name = name.rpartition(".")[0]
    place = device_map.get(name, "cpu")
    return place.index if isinstance(place, torch.device) and place.index is not None else place


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model's inputs belong: the device its embedding computes on, offloaded or not."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # of sound
        embedding = None
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    if device is None:
        found = getattr(embedding, "weight", None)
        return next(model.parameters()).device if found is None else found.device
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
