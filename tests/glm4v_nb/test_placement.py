"""Device maps: plans agree with loading, and a map is explained to the byte."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from glm4v_nb.placement import explain_device_map, meta_model, place_of, plan_device_map
from simgpu import Rig

GIB = 2**30


@pytest.fixture(scope="module")
def model():
    return meta_model()


@pytest.mark.parametrize("strategy", ["auto", "sequential"])
def test_a_plan_is_the_map_that_from_pretrained_uses(strategy):
    rig = Rig("L4", 2)
    with rig:
        budget = {index: torch.cuda.mem_get_info(index)[0] for index in range(2)} | {"cpu": 2**45}
        plan = plan_device_map(strategy, dict(budget))
        loaded = AutoModelForCausalLM.from_pretrained(
            "zai-org/glm-4v-9b", device_map=strategy, max_memory=dict(budget), dtype=torch.bfloat16
        )
    assert loaded.hf_device_map == plan


def test_explained_blocks_add_up_to_all_weights_and_follow_the_data(model):
    blocks = explain_device_map(model, {"": 0})
    assert sum(block.bytes for block in blocks) == 27_812_641_792
    names = [block.name for block in blocks]
    assert names[0] == "vision_tower.patch_embedding" and names[-1] == "lm_head"
    assert names.index("vision_tower.boundary") < names.index("language_model.embed_tokens")
    assert names.index("language_model.layers.9") < names.index("language_model.layers.10")


def test_a_block_that_a_map_cuts_appears_once_per_part(model):
    cut = {"": 0, "vision_tower.layers.5.mlp": 1}
    parts = [
        block for block in explain_device_map(model, cut) if block.name == "vision_tower.layers.5"
    ]
    assert sorted(block.place for block in parts) == [0, 1]
    assert sum(block.bytes for block in parts) == 67_926_784 * 2


def test_the_longest_prefix_of_a_map_decides_the_place():
    device_map = {"language_model": 0, "language_model.layers.1": 1}
    assert place_of("language_model.layers.1.mlp.down_proj.weight", device_map) == 1
    assert place_of("language_model.layers.10.mlp.down_proj.weight", device_map) == 0
    assert place_of("lm_head.weight", device_map) == "cpu"


def test_a_plan_for_small_cards_goes_on_to_the_cpu_and_cuts_no_block(model):
    with Rig("L4", 3):
        plan = plan_device_map("sequential", {0: 6 * GIB, 1: 6 * GIB, 2: 6 * GIB, "cpu": 2**45})
    assert set(plan.values()) == {0, 1, 2, "cpu"}
    blocks = explain_device_map(model, plan)
    assert len({block.name for block in blocks}) == len(blocks)
