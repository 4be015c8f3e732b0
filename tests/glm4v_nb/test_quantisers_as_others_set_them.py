"""Options of the libraries' own configurations, as people paste them, on the CPU."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from glm4v_nb.inference import load as load_checkpoint
from glm4v_nb.miniature import CHECKPOINT
from glm4v_nb.workload import Workload, make_prompt, prefill
from simgpu import Rig

quantization = pytest.importorskip("torchao.quantization")
pytest.importorskip("bitsandbytes")
INT8 = quantization.Int8WeightOnlyConfig()
DOWN = "language_model.layers.0.mlp.down_proj"


def load(quantiser=None, **options):
    options |= {} if quantiser is None else {"quantization_config": quantiser}
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.bfloat16, **options).eval()


def by_name(**kinds):
    return TorchAoConfig(quantization.FqnToConfig({name: INT8 for name in kinds["names"]}))


def logits(model):
    return prefill(model, make_prompt(model, Workload(text_tokens=12))).logits


@pytest.mark.parametrize(
    ("quantiser", "message"),
    [
        (BitsAndBytesConfig(), "neither load_in_4bit nor load_in_8bit.*Set one"),
        ({"quant_method": "bitsandbytes"}, "neither load_in_4bit nor load_in_8bit.*Set one"),
        (
            BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf5"),
            "bnb_4bit_quant_type is 'nf5'; expected 'nf4' or 'fp4'",
        ),
        (
            BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True),
            "quantised none of the weights.*on the CPU with llm_int8_enable_fp32_cpu_offload",
        ),
        (by_name(names=[f"{DOWN}j"]), "FqnToConfig names .*down_projj', which no module"),
        (by_name(names=[r"re:language_model\.layer\..*"]), "FqnToConfig names 're:"),
        (by_name(names=["_default"]), "by which biases are quantised too.*modules_to_not_convert"),
    ],
)
def test_what_would_be_passed_over_or_fail_at_an_answer_is_refused(quantiser, message):
    with pytest.raises(ValueError, match=message):
        load(quantiser)


@pytest.mark.parametrize(
    "name", [DOWN, "transformer.encoder.layers.0.mlp.dense_4h_to_h", rf"re:{DOWN}"]
)
def test_torchaos_table_takes_names_as_here_and_official_ones(name):
    model = load(by_name(names=[name]))
    changed = [each for each, one in model.named_parameters() if hasattr(one, "tensor_data_names")]
    assert changed == [f"{DOWN}.weight"]


def test_one_module_to_leave_may_stand_without_a_list():
    model = load(TorchAoConfig(INT8, modules_to_not_convert="vision"))
    assert type(model.vision_tower.layers[0].mlp.fc1.weight) is nn.Parameter
    assert hasattr(model.lm_head.weight, "tensor_data_names")


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_4_bits_in_another_storage_load_again_with_the_same_answers(storage, tmp_path):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=storage)
    model = load(config)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), expected)
    again.config.hidden_size *= 2  # whose matrices these are not
    with pytest.raises(ValueError, match="have other sizes than config.json describes"):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=again.config)


def test_weights_that_stay_whole_are_not_saved_as_quantised(tmp_path):
    model = load(BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True))
    with pytest.raises(ValueError, match="llm_int8_has_fp16_weight=True, and would not load again"):
        model.save_pretrained(tmp_path / "one")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quantiser", [None, TorchAoConfig(INT8)], ids=["plain", "quantised"])
@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"visoin": "cpu", "language_model": "cpu", "lm_head": "cpu"}, "names 'visoin'"),
        ({"vision": "cpu", "lm_head": "cpu"}, "gives no place to language_model"),
    ],
)
def test_a_device_map_that_forgets_a_module_is_refused(device_map, message, quantiser):
    with pytest.raises(ValueError, match=message):
        load(quantiser, device_map=device_map)


def test_double_quantised_weights_lie_on_two_simulated_cards_without_a_guess():
    device_map = {"vision_tower": 0, "language_model": 1, "lm_head": 1}
    with Rig.simulated("L4", count=2, assume="refuse") as rig:
        model, _ = load_checkpoint(CHECKPOINT, weights="nf4", device_map=device_map)
        assert logits(model).device == torch.device("cuda", 1)
        assert rig.exact
        with pytest.raises(RuntimeError, match="torch.save needs the numbers"):
            torch.save(model.state_dict(), "/dev/null")
