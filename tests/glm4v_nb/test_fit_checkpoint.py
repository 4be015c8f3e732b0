"""Will it fit? The same question for a checkpoint in a directory, of any size."""

import json

import pytest
import torch
from rig_fixtures import GOLDEN, OFFICIAL, load, split_in_two, write_config
from safetensors import safe_open

from glm4v_nb.fit import fit
from glm4v_nb.miniature import CHECKPOINT
from glm4v_nb.model import official_config
from glm4v_nb.model.configuration import read_config
from glm4v_nb.placement import plan_device_map
from glm4v_nb.workload import Workload
from simgpu import Rig

SHORT = Workload(images=0, text_tokens=8, new_tokens=1)
LIMITS = {0: 12 * 2**30, 1: 20 * 2**30, "cpu": 64 * 2**30}


def test_a_directory_is_measured_by_its_own_weights():
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as file:
        tensors = [file.get_slice(name).get_shape() for name in file.keys()]
    weight_bytes = sum(2 * torch.Size(shape).numel() for shape in tensors)
    result = fit("L4", workload=SHORT, checkpoint=CHECKPOINT)
    assert (result.verdict, result.provenance) == ("fits", "simulated")
    # Up to 511 bytes of rounding for each of some hundred tensors, and a few buffers.
    assert weight_bytes <= result.devices[0].weights_bytes < weight_bytes * 1.02


def test_the_path_may_be_text():
    assert fit("L4", workload=SHORT, checkpoint=str(CHECKPOINT)).fits


def test_only_the_configuration_of_a_directory_is_needed(tmp_path):
    directory = write_config(tmp_path / "no weights")
    assert [path.name for path in directory.iterdir()] == ["config.json"]
    assert fit("L4", workload=SHORT, checkpoint=directory).fits


def test_an_automatic_map_spreads_a_directory_over_the_cards():
    first, second = fit("L4", 2, checkpoint=CHECKPOINT).devices
    assert min(first.weights_bytes, second.weights_bytes) > 2**20


def test_the_context_is_that_of_the_directory(tmp_path):
    directory = write_config(tmp_path / "short", seq_length=100)
    assert fit(
        "L4", workload=Workload(images=0, text_tokens=100, new_tokens=1), checkpoint=directory
    ).fits
    with pytest.raises(ValueError, match="takes 101 positions, but the model's context is 100"):
        fit("L4", workload=Workload(images=0, text_tokens=101), checkpoint=directory)


def test_the_image_takes_the_positions_of_the_directory():
    # 168 pixels make 12 x 12 patches, halved to 6 x 6, with begin and end 38 positions; the context
    # is 8192.
    assert fit("L4", workload=Workload(text_tokens=8154, new_tokens=1), checkpoint=CHECKPOINT).fits
    with pytest.raises(ValueError, match=r"takes 8193 positions \(38 of them the image\)"):
        fit("L4", workload=Workload(text_tokens=8155), checkpoint=CHECKPOINT)


def test_the_official_checkpoint_is_the_default():
    named, default = (
        fit("L4", workload=SHORT, **given).to_dict() | {"seconds": 0}
        for given in ({"checkpoint": OFFICIAL}, {})
    )
    assert named == default


def test_a_map_of_ones_own_is_followed_for_a_directory():
    layers = json.loads((GOLDEN / "config.json").read_text())["num_layers"]
    result = fit("L4", 2, device_map=split_in_two(layers), workload=SHORT, checkpoint=GOLDEN)
    assert result.fits
    assert all(device.weights_bytes > 0 for device in result.devices)


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"": 1}, "puts '' on 1; expected a card's number, 0 to 0"),
        ({"": True}, "puts '' on True"),
        ({"": "disk"}, "puts '' on 'disk'"),
        ({"vision_tower": 0}, "gives no place to language_model.embed_tokens.weight"),
    ],
)
def test_a_wrong_map_for_a_directory_is_refused(device_map, message):
    with pytest.raises(ValueError, match=message):
        fit("L4", device_map=device_map, checkpoint=CHECKPOINT)


def test_what_is_on_this_machine_in_no_form_is_refused_with_what_to_do():
    with pytest.raises(
        ValueError, match="checkpoint is 'someone/model'.*hf download someone/model config.json"
    ):
        fit("L4", checkpoint="someone/model")


def test_a_directory_with_another_model_is_run_as_what_it_is(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2}))
    result = fit("L4", checkpoint=tmp_path)
    assert result.fits
    assert result.asked[1].images == 0 and result.asked[1].new_tokens == 128
    with pytest.raises(ValueError, match="GPT2LMHeadModel takes no images"):
        fit("L4", workload=Workload(images=1), checkpoint=tmp_path)


def test_the_official_configuration_needs_no_directory():
    assert read_config(OFFICIAL).to_dict() == official_config().to_dict()


def test_the_plan_of_a_directory_is_the_map_its_load_makes():
    with Rig("L4", 2):
        plan = plan_device_map("auto", LIMITS, torch.float32, checkpoint=GOLDEN)
        model = load(GOLDEN, "auto", torch.float32, max_memory=LIMITS)
    assert plan == model.hf_device_map


def test_without_cards_the_plan_puts_everything_on_the_cpu():
    assert set(plan_device_map("auto", {"cpu": 2**40}, checkpoint=CHECKPOINT).values()) == {"cpu"}
