"""``model.to`` and its like: what a loaded model may become, and what would be wrong in silence."""

import copy
import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from glm4v_nb.inference import load
from glm4v_nb.miniature import CHECKPOINT
from glm4v_nb.workload import Workload, make_prompt, prefill
from simgpu import Rig

PROMPT = Workload(text_tokens=12)
CONVERSIONS = {
    "to": lambda model: model.to(torch.float16),
    "to with a device": lambda model: model.to("cpu", torch.float32),
    "to as a tensor": lambda model: model.to(torch.zeros(1, dtype=torch.float16)),
    "half": lambda model: model.half(),
    "float": lambda model: model.float(),
    "double": lambda model: model.double(),
    "type": lambda model: model.type(torch.float16),
    "below a wrapper": lambda model: torch.nn.Sequential(model).half(),
}


@functools.cache
def quantised(weights):
    """The miniature in one of the formats, loaded once; none may change it."""
    pytest.importorskip("torchao" if weights == "int8" else "bitsandbytes")
    if weights != "LLM.int8":
        return load(CHECKPOINT, weights=weights)[0]
    config = BitsAndBytesConfig(load_in_8bit=True)
    options = {"quantization_config": config, "dtype": torch.bfloat16}
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, **options).eval()


def logits(model) -> torch.Tensor:
    return prefill(model, make_prompt(model, PROMPT)).logits


@pytest.mark.parametrize("weights", ["int8", "nf4", "LLM.int8"])
@pytest.mark.parametrize("way", CONVERSIONS)
def test_a_quantised_model_is_given_no_other_data_type_and_answers_as_before(weights, way):
    model = copy.deepcopy(quantised(weights))
    with pytest.raises(ValueError, match=r"cannot (be converted|cast)|not supported for quantized"):
        CONVERSIONS[way](model)
    assert torch.equal(logits(model), logits(quantised(weights)))


def test_the_refusal_says_what_to_do_and_that_works():
    with pytest.raises(ValueError, match=r"48 of its weights .*dtype=torch.float32\)"):
        quantised("int8").to(torch.float32)
    model, _ = load(CHECKPOINT, weights="int8", dtype=torch.float32)
    assert model.to(torch.float32).dtype == torch.float32


@pytest.mark.parametrize("weights", ["int8", "nf4", "LLM.int8"])
def test_its_own_device_changes_nothing(weights):
    model = copy.deepcopy(quantised(weights)).cpu()
    assert torch.equal(logits(model.to("cpu")), logits(quantised(weights)))


def test_int8_is_refused_under_autocast_in_float16_whose_range_its_sums_leave():
    with torch.autocast("cpu", torch.float16):
        with pytest.raises(ValueError, match="autocast computes in float16.*or use nf4"):
            logits(quantised("int8"))
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(quantised("int8")).isfinite().all()


@pytest.mark.parametrize("weights", ["int8", "nf4"])
def test_on_simulated_cards_quantised_weights_move_with_all_that_belongs_to_them(weights):
    pytest.importorskip("torchao" if weights == "int8" else "bitsandbytes")
    with Rig.simulated("L4", count=2):
        model = load(CHECKPOINT, weights=weights, device_map={"": "cpu"})[0]
        for ordinal in (0, 1):
            model.to(f"cuda:{ordinal}")
            assert logits(model).device == torch.device("cuda", ordinal)
        assert torch.cuda.max_memory_allocated(0) > model.get_memory_footprint()
        model.to("cpu")
        # What is left is cuBLAS's: 8 MiB and 128 KiB, and 1 MiB of cublasLt. Weights are 4 MB.
        assert torch.cuda.memory_allocated(1) < 9.2 * 2**20
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
