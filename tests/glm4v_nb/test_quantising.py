"""Quantised while loading, by bitsandbytes and torchao, on the CPU with the shipped miniature."""

import copy
import functools
import importlib.util
import json
import shutil
import sys
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps

from glm4v_nb.inference import fast, load
from glm4v_nb.miniature import CHECKPOINT
from glm4v_nb.miniature.evaluate import evaluate
from glm4v_nb.model.official_names import FUSED, PARTS, FusedConverter, SplitQueryKeyValue
from glm4v_nb.verify import verify
from glm4v_nb.workload import Workload, make_prompt, prefill
from simgpu import Rig

PROMPT = Workload(text_tokens=12)


def needs(library):
    return pytest.mark.skipif(
        importlib.util.find_spec(library) is None, reason=f"{library} is not installed"
    )


FORMATS = [
    pytest.param("int8", marks=needs("torchao")),
    pytest.param("nf4", marks=needs("bitsandbytes")),
]


@pytest.fixture(scope="module")
def plain():
    return load(CHECKPOINT)[0]


@pytest.fixture(scope="module")
def quantised():
    """The miniature in one of the formats, loaded once; none may change it."""
    return functools.cache(lambda weights: load(CHECKPOINT, weights=weights)[0])


def product(module: nn.Module, columns: int) -> torch.Tensor:
    """What a layer's matrix is, however it is kept."""
    return module(torch.eye(columns, dtype=torch.bfloat16)).float().T


def logits(model) -> torch.Tensor:
    return prefill(model, make_prompt(model, PROMPT)).logits


@pytest.mark.parametrize("weights", FORMATS)
def test_every_matrix_is_quantised_after_it_was_cut_but_the_head(plain, quantised, weights):
    tolerance = {"int8": 0.02, "nf4": 0.12}[weights]  # a wrong matrix is beyond 1
    model = quantised(weights)
    for name, module in plain.named_modules():
        if type(module) is not nn.Linear:
            continue
        exact, columns = module.weight.float(), module.in_features
        bias = 0 if module.bias is None else module.bias.float()[:, None]
        error = product(model.get_submodule(name), columns) - bias - exact
        relative = (error.norm() / exact.norm()).item()
        if name == "lm_head":
            assert relative == 0
        else:
            assert 1e-4 < relative < tolerance, name


@pytest.mark.parametrize("weights", FORMATS)
def test_the_miniature_answers_when_it_is_quantised(weights):
    assert evaluate(count=20, weights=weights)["accuracy"] == 1


class TakesOne(ConversionOps):
    """As torchao's: of several tensors it sees the first."""

    def convert(self, input_dict, full_layer_name=None, **_):
        (name, tensor), *_ = input_dict.items()
        assert name == full_layer_name
        return {name: (tensor[0] if isinstance(tensor, list) else tensor) + 1}


def test_a_quantiser_that_takes_one_tensor_is_given_each_part(model):
    converter = FusedConverter(
        f"{FUSED}weight", [f"{part}weight" for part in PARTS], [SplitQueryKeyValue()]
    )
    attention = model.language_model.layers[0].self_attn
    parts = [getattr(attention, f"{part}_proj").weight for part in "qkv"]
    converter.collected_tensors[f"{FUSED}weight"].append(torch.cat(parts))
    converter.quantization_operation = TakesOne()
    name = f"language_model.layers.0.{PARTS[0]}weight"
    made = converter.convert(name, model, model.config, object(), mock.Mock())
    for part, short in zip(parts, PARTS, strict=True):
        assert torch.equal(made[f"language_model.layers.0.{short}weight"], part + 1)


@pytest.mark.parametrize("weights", FORMATS)
def test_what_is_saved_loads_again_with_the_same_answers(quantised, weights, tmp_path):
    model = quantised(weights)
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 5
    in_shards = AutoModelForCausalLM.from_pretrained(tmp_path / "shards").eval()
    assert torch.equal(logits(in_shards), logits(model))
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert not any(name.startswith("transformer.") for name in names)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    assert again.get_memory_footprint() == pytest.approx(model.get_memory_footprint(), rel=1e-4)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, tmp_path)
    assert torch.equal(logits(load(tmp_path)[0]), logits(model))
    with pytest.raises(RuntimeError, match="was saved quantised, and verify compares"):
        verify(tmp_path)
    with pytest.raises(ValueError, match="quantised already"):
        load(tmp_path, weights=weights)


@pytest.mark.parametrize("weights", FORMATS)
def test_the_footprint_counts_what_quantised_weights_hold(plain, quantised, weights):
    matrices = sum(
        one.weight.numel() for one in plain.vision_tower.modules() if isinstance(one, nn.Linear)
    ) + sum(one.weight.numel() for one in plain.language_model.modules() if type(one) is nn.Linear)
    saved = plain.get_memory_footprint() - quantised(weights).get_memory_footprint()
    bytes_each = {"int8": 1, "nf4": 1.5}[weights]
    assert 0.97 * bytes_each * matrices < saved < bytes_each * matrices


@needs("torchao")
def test_official_names_are_left_alone_and_unknown_ones_refused(plain):
    model, _ = load(CHECKPOINT, weights="int8", keep=["output_layer", "vision"])
    assert type(model.lm_head.weight) is nn.Parameter
    assert torch.equal(
        model.vision_tower.layers[0].mlp.fc1.weight, plain.vision_tower.layers[0].mlp.fc1.weight
    )
    assert type(model.language_model.layers[0].mlp.down_proj.weight) is not nn.Parameter
    with pytest.raises(ValueError, match="names 'visoin', which no module"):
        load(CHECKPOINT, weights="int8", keep=["visoin"])


@needs("bitsandbytes")
def test_the_recipe_that_users_paste_leaves_the_head_and_its_typing_error_is_refused():
    recipe = {"load_in_4bit": True, "llm_int8_skip_modules": ["output_layer"]}
    for config in (BitsAndBytesConfig(**recipe), {**recipe, "quant_method": "bitsandbytes"}):
        model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, quantization_config=config)
        assert type(model.lm_head) is nn.Linear
        assert type(model.vision_tower.layers[0].mlp.fc1).__name__ == "Linear4bit"
    config = BitsAndBytesConfig(**recipe | {"llm_int8_skip_modules": ["outputlayer"]})
    with pytest.raises(ValueError, match="llm_int8_skip_modules names 'outputlayer'"):
        AutoModelForCausalLM.from_pretrained(CHECKPOINT, quantization_config=config)


def test_what_cannot_be_had_is_said_before_anything_is_loaded(monkeypatch):
    with pytest.raises(ValueError, match="weights is 'fp8'; expected one of int8, int4, nf4"):
        load(CHECKPOINT, weights="fp8")
    with pytest.raises(ValueError, match="dtype is 'bf'"):
        load(CHECKPOINT, weights="nf4", dtype="bf")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="needs bitsandbytes, which is not installed"):
        load(CHECKPOINT, weights="nf4")


@needs("torchao")
def test_int4_is_refused_without_a_card_that_has_its_kernels():
    with pytest.raises(ValueError, match="Ampere.* here is none. Use nf4"):
        load(CHECKPOINT, weights="int4")
    with Rig.simulated("T4"), pytest.raises(ValueError, match="here is 7.5. Use nf4"):
        load(CHECKPOINT, weights="int4")
    with Rig.simulated("L4"), pytest.raises(ValueError, match="multiply bfloat16 only"):
        load(CHECKPOINT, weights="int4", dtype=torch.float16)


@needs("torchao")
def test_int8_is_refused_in_float16_whose_range_its_sums_leave(quantised, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    with pytest.raises(ValueError, match="pass float16's largest number"):
        load(CHECKPOINT, weights="int8", dtype="float16")
    options = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    with pytest.raises(ValueError, match="pass float16's largest number"):
        AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float16, **options)
    quantised("int8").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pass float16's largest number"):
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)


@needs("bitsandbytes")
def test_what_was_saved_in_4_bits_keeps_its_data_type(quantised, tmp_path):
    quantised("nf4").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="saved in torch.bfloat16.*Give dtype=torch.bfloat16"):
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float16")
    AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")


@needs("torchao")
def test_rows_that_groups_do_not_divide_are_named():
    from torchao.quantization import Int4WeightOnlyConfig
    from transformers import TorchAoConfig

    int4 = Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d")  # in groups of 128
    options = {"quantization_config": TorchAoConfig(int4), "dtype": torch.bfloat16}
    with Rig.simulated("L4"), pytest.raises(ValueError, match="15 matrices, first 'vision_tower"):
        AutoModelForCausalLM.from_pretrained(CHECKPOINT, device_map={"": 0}, **options)


@pytest.mark.parametrize("weights", FORMATS)
def test_nothing_is_written_that_would_not_load_again(quantised, weights, tmp_path):
    with pytest.raises(ValueError, match="cannot be fused"):
        quantised(weights).save_pretrained(tmp_path / "one", save_original_format=True)
    assert not list(tmp_path.iterdir())


@needs("torchao")
def test_a_model_that_was_quantised_after_loading_is_not_saved(tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    quantize_(model.language_model, Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="24 weights were quantised after loading"):
        model.save_pretrained(tmp_path / "one")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("weights", FORMATS)
def test_fast_decoding_falls_back_with_its_reason(quantised, weights):
    said = {
        "int8": "weights are on the CPU",
        "nf4": "in a Linear4bit of bitsandbytes, as of quantisation",
    }
    assert said[weights] in fast.why_not(quantised(weights))


@pytest.mark.parametrize("weights", FORMATS)
def test_an_adapter_by_official_names_stands_on_quantised_weights(weights, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model, _ = load(CHECKPOINT, weights=weights)
    without = logits(model)
    config = LoraConfig(r=4, target_modules=["query_key_value"], init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    with_adapter = logits(adapted)
    assert not torch.equal(with_adapter, without)
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(CHECKPOINT, weights=weights)[0], tmp_path).eval()
    assert torch.equal(logits(again), with_adapter)


@needs("torchao")
def test_a_strangers_quantiser_is_looked_at(quantised, tmp_path):
    """torchao calls what config.json names among all that some of its modules hold."""
    quantised("int8").save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    kind = content["quantization_config"]["quant_type"]["default"]
    for change, found in (({"_type": "partial"}, "'partial'"), ({"_data": {"a": "b"}}, "'b'")):
        content["quantization_config"]["quant_type"]["default"] = {**kind, **change}
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"config.json.*quantization_config.*{found}"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    content["quantization_config"]["quant_type"]["default"] = kind
    (tmp_path / "config.json").write_text(json.dumps(content))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    weight = "language_model.layers.1.mlp.down_proj.weight"
    wrong = ("[1]", '{"_type": "Float8Tensor", "_data": {"block_size": [1, 512]}}')
    for described in (*wrong, metadata[weight].replace("512", "7")):
        save_file(tensors, file, metadata | {weight: described})
        with pytest.raises(ValueError, match="is not what torchao writes"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    packed = "language_model.layers.1.mlp.down_proj._weight_qdata"
    tensors[packed] = tensors[packed][:-1].clone()
    save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match="layers.1.mlp.down_proj.weight.*is not what torchao"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@needs("bitsandbytes")
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("use", ["state_dict", "train", "dequantize"])
def test_4_bits_that_an_answer_has_turned_are_turned_back_before_others_read_them(double, use):
    """As bitsandbytes turns them on processors with AVX-512 for bfloat16; else nothing would say
    that what is merged, saved or trained is no longer the model."""
    from bitsandbytes import functional

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=double)
    model = AutoModelForCausalLM.from_pretrained(
        CHECKPOINT, dtype=torch.bfloat16, quantization_config=config
    )
    layer, name = model.language_model.layers[0].mlp, "down_proj"
    weight = layer.get_submodule(name).weight
    before = functional.dequantize_4bit(weight.data, weight.quant_state).float()
    weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu(
        weight.data, weight.quant_state
    )
    getattr(model, use)()
    after = layer.get_submodule(name).weight
    if use != "dequantize":
        after = functional.dequantize_4bit(after.data, after.quant_state)
    # Scales are rounded to 8 bits of bfloat16; turned they are beyond 1.
    assert (after.float() - before).norm() < 0.01 * before.norm()


@needs("bitsandbytes")
def test_a_model_that_was_saved_can_be_dequantised(quantised, tmp_path):
    model = copy.deepcopy(quantised("nf4"))
    model.save_pretrained(tmp_path)
    assert model.dequantize().language_model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
