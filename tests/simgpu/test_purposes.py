"""What memory is for, told by whoever made it; by values that are known beforehand."""

import pytest
import torch
from rig_fixtures import MIB, load
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from glm4v_nb.fit import load as load_full_size
from glm4v_nb.fit import run_workload
from glm4v_nb.workload import Workload
from simgpu import Rig
from simgpu.monitor import Monitor, read_samples

TOKEN_BYTES = 40 * 2**10  # of the full-size model's KV cache, in bfloat16


def sizes(rig) -> dict[str, int]:
    """Bytes by purpose on the first card."""
    found = {}
    for block in rig.blocks(0):
        found[block.purpose] = found.get(block.purpose, 0) + block.bytes
    return found


def largest_cache(samples: list[dict]) -> int:
    return max(sum(card["kv_cache_bytes"] for card in sample["cards"]) for sample in samples)


@pytest.fixture(scope="module")
def full_size():
    """The full-size model on a card that it leaves room on: the rig, and the model."""
    rig = Rig.simulated("H200")
    return rig, load_full_size(rig, {"": 0}, torch.bfloat16)


def test_the_full_size_model_is_all_weights_after_its_load(full_size):
    rig, _ = full_size
    # Workspaces of matrix products stay of the runs of other tests.
    now = {name: size for name, size in sizes(rig).items() if name != "workspace"}
    assert now == {"weights": rig.stages[0].memory[0].allocated_bytes}


def test_a_training_step_without_a_cache_has_no_kv_cache(full_size, tmp_path):
    rig, model = full_size
    workload = Workload(images=0, text_tokens=512, new_tokens=0, train=True, trained="decoder")
    with Monitor(rig, tmp_path / "samples"):
        run_workload(rig, model, workload)
    samples = read_samples(tmp_path / "samples")
    assert ["backward"] in [sample["stages"] for sample in samples]
    assert largest_cache(samples) == 0
    model.zero_grad()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_kv_cache_of_inference_is_forty_kib_a_token(full_size, batch_size, tmp_path):
    rig, model = full_size
    with Monitor(rig, tmp_path / "samples"):
        run_workload(rig, model, Workload(batch_size, 0, text_tokens=512, new_tokens=65))
    samples = read_samples(tmp_path / "samples")
    by_stage = [
        [sample for sample in samples if sample["stages"] == [name]][-1]
        for name in ("prefill", "decode")
    ]
    found = [sample["cards"][0]["kv_cache_bytes"] for sample in by_stage]
    # Of the 65 new tokens the last is not read again.
    assert found == [batch_size * tokens * TOKEN_BYTES for tokens in (512, 512 + 64)]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_what_a_cache_keeps_is_kv_cache_and_no_other_tensor_of_its_shape(kind):
    rig = Rig.simulated("L4")
    config = LlamaConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=2)
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config, max_cache_len=1024)
    with rig:
        keys = torch.zeros(1, 2, 1024, 32, device="cuda")
        other = torch.cat((keys, keys), dim=1)
        assert sizes(rig) == {"activations": 3 * keys.nbytes}
        cache.update(keys, keys, 0)
        counter = 512 if kind == "static" else 0  # how many positions are filled
        assert sizes(rig)["KV cache"] == 2 * keys.nbytes + counter
        del keys, other
        assert cache.layers[0].keys.device.index == 0
        del cache
    assert sizes(rig) == {}


def test_weights_are_told_when_a_load_ends_also_of_a_model_made_by_hand():
    rig = Rig.simulated("L4")
    with rig:
        with rig.stage("load"):
            layer = torch.nn.Linear(1024, 1024, bias=False).to("cuda")
            scratch = torch.zeros(MIB, dtype=torch.uint8, device="cuda")
        assert sizes(rig) == {"weights": layer.weight.nbytes, "activations": scratch.nbytes}


def test_a_model_loaded_within_a_stage_of_another_name_is_weights():
    rig = Rig.simulated("L4")
    with rig, rig.stage("everything"):
        model = load(device_map={"": 0})
        assert set(sizes(rig)) == {"weights"}
    del model


def test_a_training_step_leaves_weights_gradients_and_two_numbers_per_weight():
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, vocab_size=1024
    )
    rig = Rig.simulated("L4")
    with rig:
        with rig.stage("load"):
            model = LlamaForCausalLM(config).to("cuda")
        weights = sum(each.nbytes for each in model.parameters())
        rest = sum(-(-each.nbytes // 512) * 512 for each in model.buffers())
        optimizer = torch.optim.AdamW(model.parameters())
        prompt = torch.zeros(1, 32, dtype=torch.int64, device="cuda")
        model(prompt, labels=prompt, use_cache=False).loss.backward()
        del prompt
        found = sizes(rig)
        assert (found["weights"], found["gradients"]) == (weights + rest, weights)
        optimizer.step()
        assert sizes(rig)["optimizer state"] == 2 * weights
        optimizer.zero_grad()
        assert "gradients" not in sizes(rig)


def test_a_loaded_model_can_be_moved_to_another_type_as_without_a_rig():
    with Rig.simulated("L4", 1) as rig:
        with rig.stage("load"):
            model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 8)).cuda()
        before = rig.memory()[0].allocated_bytes
        model.to(torch.bfloat16)
        assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
        assert rig.memory()[0].allocated_bytes <= before
