"""The official layout in and out: Auto classes, tensor names, config.json, parameter counts."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.quantizers import HfQuantizer

from glm4v_nb.model import GLM4VConfig, GLM4VForConditionalGeneration, official_config
from glm4v_nb.model.configuration import OFFICIAL_VISION_KEYS
from glm4v_nb.model.processing import GLM4VProcessor
from glm4v_nb.model.tokenization import ChatGLM4Tokenizer

RECOMPUTED = "transformer.rotary_pos_emb.inv_freq"
MODEL_CLASSES = (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText)


def official_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's weights files under its name in the file."""
    return {
        name: tensor
        for path in sorted(directory.glob("model*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    assert all(actual[name].dtype == expected[name].dtype for name in expected)
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.fixture
def plant(chat_checkpoint, tmp_path):
    """A copy of a checkpoint with code in every place where transformers looks for code to run.

    Returns the directory and the file that comes into being if any of the code runs.
    """
    directory, marker = tmp_path / "planted", tmp_path / "ran"
    directory.mkdir()
    for path in chat_checkpoint.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    code = f"open({str(marker)!r}, 'a').write(__file__)\nraise RuntimeError('remote code ran')\n"
    (directory / "custom_generate").mkdir()
    for name in (
        "configuration_chatglm",
        "modeling_chatglm",
        "tokenization_chatglm",
        "custom_generate/generate",
    ):
        (directory / f"{name}.py").write_text(code)
    auto_maps = {
        "config.json": {
            "AutoConfig": "configuration_chatglm.ChatGLMConfig",
            **{
                auto.__name__: "modeling_chatglm.ChatGLMForConditionalGeneration"
                for auto in MODEL_CLASSES
            },
        },
        "tokenizer_config.json": {
            "AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]
        },
    }
    for name, auto_map in auto_maps.items():
        content = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(content | {"auto_map": auto_map}))
    return directory, marker


@pytest.mark.parametrize(
    "trust", [{}, {"trust_remote_code": True}, {"trust_remote_code": False}], ids=str
)
def test_the_auto_classes_load_the_official_layout_and_run_no_code_of_it(plant, monkeypatch, trust):
    directory, marker = plant
    monkeypatch.setattr(
        "builtins.input", lambda *_: pytest.fail("asked whether to run remote code")
    )
    assert type(AutoConfig.from_pretrained(directory, **trust)) is GLM4VConfig
    for auto_class in MODEL_CLASSES:
        model = auto_class.from_pretrained(directory, **trust)
        assert type(model) is GLM4VForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(directory, **trust)) is GLM4VProcessor
    assert type(GLM4VForConditionalGeneration.from_pretrained(directory, **trust)) is type(model)
    # "Ran" would also be a method replaced by the directory's own.
    assert "generate" not in vars(model)
    assert not marker.exists()


@pytest.mark.parametrize(
    "trust", [{}, {"trust_remote_code": False}, {"trust_remote_code": True}], ids=str
)
def test_autotokenizer_loads_the_official_files_and_runs_no_code_of_theirs(
    plant, monkeypatch, trust
):
    directory, marker = plant
    monkeypatch.setattr(
        "builtins.input", lambda *_: pytest.fail("asked whether to run remote code")
    )
    try:
        assert type(AutoTokenizer.from_pretrained(directory, **trust)) is ChatGLM4Tokenizer
    finally:
        assert not marker.exists()


def test_every_tensor_of_the_checkpoint_is_used(load):
    _, info = AutoModelForCausalLM.from_pretrained(
        load().config._name_or_path, output_loading_info=True
    )
    assert not any(
        info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    )


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "200KB"}], ids=["one file", "sharded"])
def test_saving_writes_the_official_names_and_a_reload_is_bit_identical(
    model, checkpoint, tmp_path, shards
):
    model.save_pretrained(tmp_path, **shards)
    expected = official_tensors(checkpoint)
    del expected[RECOMPUTED]
    assert_same_tensors(official_tensors(tmp_path), expected)
    if shards:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == expected.keys()
        assert len(set(index["weight_map"].values())) > 1
    assert_same_tensors(
        AutoModelForCausalLM.from_pretrained(tmp_path).state_dict(), model.state_dict()
    )


def test_quantised_weights_are_saved_under_the_names_here(load, tmp_path):
    """Packed bytes of queries, keys and values are not those of the three packed together."""
    model = load()
    model.hf_quantizer = mock.Mock(spec=HfQuantizer)
    model.hf_quantizer.get_state_dict_and_metadata.return_value = None, {}
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert_same_tensors(saved, model.state_dict())


def test_a_model_built_from_a_configuration_saves_the_official_names_too(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path)
    written = official_tensors(tmp_path)
    assert written.keys() | {RECOMPUTED} == official_tensors(checkpoint).keys()
    attention = model.language_model.layers[1].self_attn
    for kind in ("weight", "bias"):
        parts = [getattr(getattr(attention, f"{part}_proj"), kind) for part in "qkv"]
        name = f"transformer.encoder.layers.1.self_attention.query_key_value.{kind}"
        assert torch.equal(written[name], torch.cat(parts))
    assert_same_tensors(
        AutoModelForCausalLM.from_pretrained(tmp_path).state_dict(), model.state_dict()
    )


def test_bfloat16_is_kept_through_loading_saving_and_loading(checkpoint, model, tmp_path):
    half = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    exact = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    assert_same_tensors(half.state_dict(), exact)
    half.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in official_tensors(tmp_path).values()} == {torch.bfloat16}
    # Without dtype, the checkpoint's own counts.
    assert_same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path).state_dict(), exact)


def test_the_saved_config_keeps_the_official_keys_and_values(model, checkpoint, tmp_path):
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    official = json.loads((checkpoint / "config.json").read_text())
    # transformers' own new name of this key; it reads both.
    official["dtype"] = official.pop("torch_dtype")
    assert {name: saved.get(name) for name in official} == official
    assert saved.keys() - official.keys() <= {"transformers_version", "initializer_range"}
    assert saved["model_type"] == "chatglm"
    assert saved["vision_config"].keys() == set(OFFICIAL_VISION_KEYS)


def test_the_config_is_the_same_after_saving_and_loading(tmp_path):
    config = official_config()
    config.save_pretrained(tmp_path)
    reloaded = AutoConfig.from_pretrained(tmp_path)
    assert reloaded.to_json_string() == config.to_json_string()
    assert reloaded.text_config.to_json_string() == config.text_config.to_json_string()


def test_overrides_of_the_config_reach_the_decoder_and_the_tower(checkpoint):
    for name in ("num_layers", "num_hidden_layers"):
        config = AutoConfig.from_pretrained(checkpoint, **{name: 1})
        assert (config.num_layers, config.text_config.num_hidden_layers) == (1, 1)
    config = AutoConfig.from_pretrained(checkpoint, vision_config={"num_hidden_layers": 2})
    assert (config.vision_config.num_hidden_layers, config.vision_config.image_size) == (2, 56)
    config, unused = AutoConfig.from_pretrained(
        checkpoint, seq_length=64, other=1, return_unused_kwargs=True
    )
    assert (config.text_config.max_position_embeddings, unused) == (64, {"other": 1})


def parameters(*modules) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def test_the_full_size_model_has_the_official_number_of_parameters():
    with torch.device("meta"):
        model = GLM4VForConditionalGeneration(official_config())
    text, tower = model.language_model, model.vision_tower
    assert parameters(model) == 13_906_320_896
    assert parameters(text, model.lm_head) == 9_399_951_360
    assert parameters(text.embed_tokens) == parameters(model.lm_head) == 620_756_992
    assert [parameters(layer) for layer in text.layers] == [203_960_832] * 40
    assert parameters(tower) == 4_506_369_536
    assert [parameters(layer) for layer in tower.layers] == [67_926_784] * 63
    assert parameters(tower.linear_proj) == 185_081_856
    assert parameters(tower.conv) == 29_364_224
    assert parameters(tower.patch_embedding) == 12_527_872


def test_modules_are_registered_in_the_order_data_flows(model):
    assert [name for name, _ in model.named_children()] == [
        "vision_tower",
        "language_model",
        "lm_head",
    ]
    order = [name for name, module in model.named_modules() if not list(module.children())]
    calls = []
    leaves = {name: model.get_submodule(name) for name in order}
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, module in leaves.items()
    ]
    pixel_values = torch.zeros(1, 3, 56, 56)
    model(input_ids=torch.tensor([[304, 311, 301, 312, 20]]), pixel_values=pixel_values)
    for hook in hooks:
        hook.remove()
    blocks = [".".join(name.split(".")[: 3 if ".layers." in name else 2]) for name in calls]
    # The embedding of the text and the rotary table may be computed at any time before the
    # decoder's layers.
    ran = [
        name for name in dict.fromkeys(blocks) if not name.endswith(("embed_tokens", "rotary_emb"))
    ]
    registered = [
        ".".join(name.split(".")[: 3 if ".layers." in name else 2])
        for name in order
        if not name.endswith(("embed_tokens", "rotary_emb"))
    ]
    assert ran == [name for name in dict.fromkeys(registered) if name in ran]
    assert len(ran) > 10


def test_a_saved_file_is_marked_as_torch_weights(model, tmp_path):
    # Loaders of other projects refuse a file without this mark.
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
