"""``fit`` of any model of transformers, from its configuration alone."""

import json

import pytest
import torch
from transformers import (
    BertConfig,
    Gemma3Config,
    LlamaConfig,
    MambaConfig,
    Qwen2_5_VLConfig,
    T5Config,
    ViTConfig,
    WhisperConfig,
)

import simgpu
from simgpu import Rig, find_card
from simgpu.cli import main
from simgpu.fitting import Deployment
from simgpu.limits import Trials, frontier, limits

WIDTH, LAYERS, WORDS = 256, 4, 1000
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": WORDS,
    "max_position_embeddings": 2048,
}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
MROPE = {"rope_type": "default", "mrope_section": [8, 12, 12]}
MODELS = {
    "LlamaForCausalLM": LlamaConfig(**TEXT),
    "MambaForCausalLM": MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=WORDS),
    "BertForMaskedLM": BertConfig(**SMALL, intermediate_size=64),
    "T5ForConditionalGeneration": T5Config(d_model=64, num_layers=2, d_ff=64, vocab_size=WORDS),
    "WhisperForConditionalGeneration": WhisperConfig(
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    ),
    "ViTForImageClassification": ViTConfig(**SMALL, intermediate_size=64),
    "Qwen2_5_VLForConditionalGeneration": Qwen2_5_VLConfig(
        text_config=TEXT
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12]}},
        vision_config={"depth": 2, "hidden_size": 64, "num_heads": 2, "out_hidden_size": WIDTH},
        image_token_id=990,
        vision_start_token_id=991,
        video_token_id=992,
    ),
    "Gemma3ForConditionalGeneration": Gemma3Config(
        text_config=TEXT | {"head_dim": 64},
        vision_config=SMALL | {"intermediate_size": 64, "image_size": 224, "patch_size": 14},
        mm_tokens_per_image=64,
        image_token_index=990,
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The directory of a model: its config.json and nothing else."""

    def make(name):
        directory = tmp_path_factory.mktemp(name)
        MODELS[name].save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="module")
def llama(checkpoint):
    return checkpoint("LlamaForCausalLM")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_every_kind_is_loaded_asked_and_answers(name, checkpoint):
    deployment = Deployment("L4", checkpoint=checkpoint(name))
    workload = deployment.recipe.workload(text_tokens=16, batch_size=2)
    assert deployment.recipe.model_class.__name__ == name
    assert bool(workload.images) == ("Qwen" in name or "Gemma" in name)
    assert (
        bool(workload.new_tokens)
        == deployment.recipe.generates
        == ("For" + "Masked" not in name and "Classification" not in name)
    )
    result = deployment.fit(workload)
    assert result.fits
    assert result.exact or set(result.unmodelled) == {"convolution"}
    (device,) = result.devices
    parameters = sum(each.nbytes for each in deployment.meta_model.parameters())
    assert parameters <= device.weights_bytes < device.peak_allocated_bytes
    assert sum(result.by_purpose[0].values()) == device.peak_allocated_bytes


def test_the_kv_cache_is_what_the_positions_take(llama):
    deployment = Deployment("L4", checkpoint=llama)
    workload = deployment.recipe.workload(batch_size=3, text_tokens=100, new_tokens=29)
    cache = deployment.fit(workload).by_purpose[0]["KV cache"]
    # The peak is the prefill's: keys and values of 100 positions, two heads of 64 features.
    assert cache == 3 * 100 * 2 * LAYERS * 2 * 64 * 2
    assert deployment.recipe.cache_bytes(workload, 2) == 3 * 129 * 2 * LAYERS * 2 * 64 * 2


@pytest.mark.parametrize("trained", ["everything", "lora"])
def test_a_training_step_has_gradients_of_what_it_trains(llama, trained):
    deployment = Deployment("L4", checkpoint=llama)
    sizes = {"train": True, "trained": trained, "optimizer": "adamw"}
    result = deployment.fit(deployment.recipe.workload(**sizes))
    weights = sum(each.nbytes for each in deployment.meta_model.parameters())
    found = result.by_purpose[0]
    assert (found["gradients"] >= weights) == (trained == "everything")
    assert (found["optimizer"] >= weights) == (trained == "everything")


def test_cards_that_differ_are_filled_as_far_as_each_goes(llama):
    weights = 2 * sum(each.numel() for each in Deployment(checkpoint=llama).meta_model.parameters())
    assert weights < 8 * 2**20
    cards = ("L4", "RTX 3090")
    result = simgpu.fit(MODELS["LlamaForCausalLM"], cards, text_tokens=16)
    assert result.fits and result.asked[1].text_tokens == 16
    assert [device.card for device in result.devices] == list(cards)
    assert all(device.weights_bytes for device in result.devices)
    # Nothing but the context goes on a card that others have filled.
    used = Deployment(cards, checkpoint=llama, free_gib=(0.241, 20)).fit()
    assert used.fits and used.devices[0].weights_bytes == 0
    assert "L4: 0.241 GiB free" in used.provenance


def test_limits_and_a_frontier_are_those_of_the_model(llama):
    deployment = Deployment("L4 2GiB", checkpoint=llama)
    trials = Trials(deployment)
    workload = deployment.recipe.workload(text_tokens=512, new_tokens=1)
    found = limits(trials, workload)
    assert found.largest_batch.limited_by == "memory"
    assert trials.run(type(workload)(found.largest_batch.size, 0, 512, 1)).fits
    assert found.longest_context.size == 2048 and found.longest_context.limited_by == "model"
    lines = found.recommendation.code
    with Rig.simulated("L4 2GiB"):
        names = {}
        exec(lines, names)
    assert type(names["model"]).__name__ == "LlamaForCausalLM"
    drawn = frontier(trials, workload, [64, 2048])
    assert drawn[64] > drawn[2048] > 0


def test_what_a_model_does_not_take_is_refused(checkpoint, llama):
    for name, sizes, said in (
        ("LlamaForCausalLM", {"images": 1}, "takes no images"),
        ("LlamaForCausalLM", {"text_tokens": 3000}, "takes 3000 positions, but .* is 2048"),
        ("BertForMaskedLM", {"new_tokens": 5}, "generates no tokens"),
    ):
        deployment = Deployment("L4", checkpoint=checkpoint(name))
        with pytest.raises(ValueError, match=said):
            deployment.fit(deployment.recipe.workload(**sizes))


def test_the_command_line_answers_for_any_directory(llama, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["fit", str(llama), "--tokens", "64", "--new-tokens", "4"]
    two = ["--cards", "RTX 4090,RTX 3090", "--batch", "2"]
    assert main([*common, *two, "--plot", "peak.png", "--json"]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert [device["card"] for device in answer["devices"]] == ["RTX 4090", "RTX 3090"]
    assert answer["versions"]["torch"] == torch.__version__ and answer["exact"] is True
    assert (tmp_path / "peak.png").read_bytes().startswith(b"\x89PNG")
    small = ["--card", "L4", "--memory-gib", "1.5", "--batch", "20000"]
    assert main([*common, *small, "--json"]) == 3
    answer = json.loads(capfd.readouterr().out)
    assert answer["devices"][0]["capacity_bytes"] == 1.5 * 2**30 < answer["needs_bytes"]
    assert main([*common, *small]) == 3
    assert f"Next: simgpu fit {llama} --card" in capfd.readouterr().out
    assert main(["fit", "no/such-model", "--card", "L4"]) == 2
    assert "Run: hf download no/such-model config.json" in capfd.readouterr().err
    assert main(["fit", str(tmp_path / "none"), "--card", "L4"]) == 2
    assert "give a directory that has a config.json" in capfd.readouterr().err


def test_a_card_given_by_its_kind_and_size_is_like_its_kind():
    assert find_card("L4 48GiB").cublas_workspace_bytes == find_card("L4").cublas_workspace_bytes
