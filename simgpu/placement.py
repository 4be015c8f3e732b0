"""Device maps: what transformers plans for given cards, and whether one of your own is whole."""

import difflib
import json
import os
from collections import Counter
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.accelerate import _get_device_map
from transformers.quantizers.auto import AutoHfQuantizer

# Where a module runs: a card's index, "cpu" or "disk".
Place = int | str
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


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

    ``strategy`` is one of ``DEVICE_MAPS``; ``max_memory`` bytes per
    card index, and for "cpu".
    """
    return dict(_get_device_map(model, strategy, max_memory, getattr(model, "hf_quantizer", None)))


def quantised_model(model: PreTrainedModel, quantization_config) -> PreTrainedModel:
    """A ``meta_model`` as the loader has it when it plans for weights that it will quantise."""
    quantizer = AutoHfQuantizer.from_config(quantization_config, pre_quantized=False)
    quantizer.preprocess_model(model=model, dtype=model.dtype, device_map=None)
    model.hf_quantizer = quantizer
    return model


def is_trainable(quantization_config) -> bool:
    """Whether adapters on weights that are quantised so can be trained, as transformers says."""
    return AutoHfQuantizer.from_config(quantization_config, pre_quantized=False).is_trainable


def check_device_map(device_map: dict[str, Place], count: int, model: PreTrainedModel):
    """Check a map written by hand for ``count`` cards and a model, of which names are enough.

    Raises:
        ValueError: a place that is neither one of the cards nor "cpu", no card at all for weights
            that are to be quantised; as ``check_names``.
    """
    for name, place in device_map.items():
        is_card = isinstance(place, int) and not isinstance(place, bool) and 0 <= place < count
        if not is_card and place != "cpu":
            raise ValueError(
                f"device_map puts {name!r} on {place!r}; expected a card's number, 0 to"
                f' {count - 1}, or "cpu". Correct the place, or take more cards.'
            )
    if getattr(model, "hf_quantizer", None) is not None and {*device_map.values()} == {"cpu"}:
        raise ValueError(
            "device_map puts all of the model on the CPU, where no weights are quantised in a"
            " simulation. Give some of it a card."
        )
    check_names(device_map, model)


def check_names(device_map: dict[str, Place], model: PreTrainedModel):
    """Check that a map names modules of the model, and gives each parameter one place.

    Raises:
        ValueError: a name the model does not have, a parameter without a place, "" beside other
            names, or a module inside another one that has another place.
    """
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
    """Bytes of a model's weights in every place of a map; of a ``quantised_model`` without what
    belongs to each block of numbers."""
    sizes: Counter[Place] = Counter()
    quantizer = getattr(model, "hf_quantizer", None)
    for name, weight in model.named_parameters():
        each = weight.itemsize
        if quantizer is not None:
            each = quantizer.param_element_size(model, name, weight)
        sizes[place_of(name, device_map)] += int(weight.numel() * each)
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


def read_device_map(text: str) -> str | dict[str, Place]:
    """A device map as the command line takes it: a strategy's name, a JSON object, a JSON file;
    ValueError for anything else."""
    if text in DEVICE_MAPS:
        return text
    is_object = text.lstrip().startswith("{")
    if not is_object and not os.path.isfile(text):
        raise ValueError(
            f"device_map is {text[:200]!r}; expected one of {', '.join(DEVICE_MAPS)}, a JSON object"
            " such as '{\"\": 0}', or the path of a JSON file. There is no file of that name."
        )
    source, expected = "device_map" if is_object else text, 'Expected {"module": card, ...}.'
    try:
        text = text if is_object else Path(text).read_text(encoding="utf-8")
        device_map = json.loads(text, object_pairs_hook=_without_repetition)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not JSON: {error}. {expected}") from None
    if not isinstance(device_map, dict):
        raise ValueError(f"{source} holds no JSON object. {expected}")
    return device_map


def _without_repetition(pairs: list[tuple[str, object]]) -> dict:
    """JSON allows a name twice, and Python would silently take the last."""
    for name, times in Counter(name for name, _ in pairs).items():
        if times > 1:
            raise ValueError(f"{name!r} stands there {times} times; give each module one place")
    return dict(pairs)
