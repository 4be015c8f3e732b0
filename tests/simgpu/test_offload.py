"""Parts of the model on disk, and maps over several devices that keep every block whole.

accelerate brings a module's own parameters just before that module's forward. A parameter used
outside the forward of the module that owns it is therefore missing exactly when it is offloaded.
"""

import pytest
import torch
from accelerate import infer_auto_device_map

from glm4v_nb.model import GLM4VForConditionalGeneration, official_config, vision

PLACES = [
    "vision_tower.patch_embedding",
    *(f"vision_tower.layers.{number}" for number in range(3)),
    "vision_tower.conv",
    "vision_tower.linear_proj",
    "vision_tower.boundary",
    "language_model.embed_tokens",
    *(f"language_model.layers.{number}" for number in range(3)),
    "language_model.norm",
    "language_model.rotary_emb",
    "lm_head",
]
# What may never be cut: a residual connection inside, or parameters that forward reads itself.
WHOLE = (
    vision.GLM4VPatchEmbedding,
    vision.GLM4VVisionLayer,
    vision.GLM4VProjector,
    vision.GLM4VImageBoundary,
    "GlmDecoderLayer",
)


def only_on_disk(*places):
    return {place: "disk" if place.startswith(places) else "cpu" for place in PLACES}


MAPS = {
    "everything": {"": "disk"},
    "the tower": {"vision_tower": "disk", "language_model": "cpu", "lm_head": "cpu"},
    "the decoder and the head": {
        "vision_tower": "cpu",
        "language_model": "disk",
        "lm_head": "disk",
    },
    "everything, piece by piece": only_on_disk(""),
    **{place: only_on_disk(place) for place in PLACES if place != "language_model.rotary_emb"},
}


@pytest.mark.parametrize("device_map", MAPS.values(), ids=MAPS.keys())
def test_with_parts_on_disk_the_answers_are_the_same(model, load, golden, tmp_path, device_map):
    offloaded = load(device_map=device_map, offload_folder=tmp_path).requires_grad_(False)
    on_disk = {name for name, parameter in offloaded.named_parameters() if parameter.is_meta}
    expected = [place for place, device in device_map.items() if device == "disk"]
    assert on_disk == {
        name for name, _ in model.named_parameters() if name.startswith(tuple(expected))
    }
    inputs = {"input_ids": golden["image.input_ids"], "pixel_values": golden["vision.pixel_values"]}
    # The same operations on the same numbers: nothing to round differently.
    assert torch.equal(offloaded(**inputs).logits, model(**inputs).logits)
    text = {"input_ids": golden["text.input_ids"]}
    assert torch.equal(offloaded(**text).logits, model(**text).logits)


@pytest.mark.filterwarnings(
    "ignore:You are calling .generate"
)  # 5.17 takes a model on disk for one on "meta"
def test_a_model_on_disk_generates_the_originals_tokens(load, golden, tmp_path):
    offloaded = load(device_map={"": "disk"}, offload_folder=tmp_path)
    inputs = {"input_ids": golden["image.input_ids"], "pixel_values": golden["vision.pixel_values"]}
    ids = offloaded.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert torch.equal(ids[:, 13:], golden["image.greedy"])


def test_a_model_with_parts_on_disk_saves_the_official_layout(model, load, tmp_path):
    offloaded = load(device_map=MAPS["the tower"], offload_folder=tmp_path / "offload")
    offloaded.save_pretrained(tmp_path / "saved")
    reloaded = GLM4VForConditionalGeneration.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(tensor, reloaded[name]) for name, tensor in model.state_dict().items())


def devices_of(device_map, name):
    """The devices on which a module's parameters lie, by the map's entries for it, above it or
    inside it."""
    above = [key for key in device_map if key == "" or name == key or name.startswith(key + ".")]
    inside = [key for key in device_map if key.startswith(name + ".")]
    return {device_map[key] for key in above + inside}


def blocks(model):
    for name, module in model.named_modules():
        if any(module.__class__ is kind or type(module).__name__ == kind for kind in WHOLE):
            yield name, module


def size(module):
    return sum(parameter.nbytes for parameter in module.parameters())


def assert_no_block_is_cut(model, devices, budget):
    budgets = {**dict.fromkeys(range(devices), budget), "cpu": 10**12}
    device_map = infer_auto_device_map(
        model, max_memory=budgets, no_split_module_classes=model._no_split_modules
    )
    cut = [name for name, _ in blocks(model) if len(devices_of(device_map, name)) > 1]
    assert cut == []
    # In the order data flows, which is the order of registration, it never goes back to an earlier
    # device.
    order = [
        list(budgets).index(device)
        for name, _ in model.named_parameters()
        for device in devices_of(device_map, name)
    ]
    assert order == sorted(order)
    return set(device_map.values())


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_an_automatic_map_keeps_every_block_whole_on_small_devices(model, devices):
    largest = max(size(module) for _, module in blocks(model))
    used = set()
    for share in range(1, 40):
        # From less than a single block to the whole model on one device.
        used |= assert_no_block_is_cut(model, devices, largest // 2 + share * size(model) // 40)
    assert used >= {*range(devices), "cpu"}


@pytest.mark.parametrize(("devices", "gigabytes"), [(2, 17), (4, 9), (8, 4)])
def test_an_automatic_map_keeps_every_block_whole_at_full_size(devices, gigabytes):
    with torch.device("meta"):
        full = GLM4VForConditionalGeneration(official_config()).to(torch.bfloat16)
    assert assert_no_block_is_cut(full, devices, gigabytes * 10**9) >= set(range(devices))
