"""The prefill's fused kernels on the CPU, by Triton's interpreter, beside plain PyTorch."""

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from rig_fixtures import load as load_on_cards
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.glm.modeling_glm import GlmRMSNorm, apply_rotary_pos_emb

from glm4v_nb.inference import fast
from glm4v_nb.inference.fast import FastDecoder
from glm4v_nb.model import GLM4VForConditionalGeneration
from glm4v_nb.workload import Workload, make_prompt, prefill
from simgpu import Rig

GOLDEN = "tests/golden/checkpoint"


@pytest.fixture(scope="module", autouse=True)
def short_caches(interpreter):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "CAPACITY_STEP", 64)
        yield


@pytest.fixture(scope="module")
def own(load):
    return load().requires_grad_(False)


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def randomised(norm: nn.Module) -> nn.Module:
    for one in norm.parameters():
        nn.init.normal_(one)
    return norm.requires_grad_(False)


# Sizes are no powers of two, and more rows than a program takes.
@pytest.mark.parametrize("is_added", [False, True])
def test_residual_and_root_mean_square_norm_are_one_kernel(is_added):
    from glm4v_nb.inference.prefill import add_rms_norm

    norm = randomised(GlmRMSNorm(48, eps=1e-2))
    x, delta = torch.randn(2, 2, 37, 48)
    before = x.clone()
    total, y = add_rms_norm(x, delta if is_added else None, norm)
    assert torch.equal(x, before)
    torch.testing.assert_close(total, x + delta if is_added else x)
    torch.testing.assert_close(y, norm(total))


def test_layer_norm_and_residual_are_one_kernel():
    from glm4v_nb.inference.prefill import layer_norm_add

    norm = randomised(nn.LayerNorm(48, eps=1e-2))
    x, delta = torch.randn(2, 2, 37, 48)
    torch.testing.assert_close(layer_norm_add(x, delta, norm), x + norm(delta))


def test_gate_and_product_are_one_kernel():
    from glm4v_nb.inference.prefill import gate

    both = torch.randn(2, 37, 2 * 2100)  # more columns than a program takes
    gates, ups = both.chunk(2, dim=-1)
    torch.testing.assert_close(gate(both), functional.silu(gates) * ups)


@pytest.mark.parametrize("rows", [1, 2])
def test_rotation_is_in_place_and_leaves_the_rest(rows):
    from glm4v_nb.inference.prefill import rotate

    heads = torch.randn(2, 37, 5, 16)
    angles = torch.randn(rows, 37, 4).repeat(1, 1, 2)  # the pairs', twice, as transformers has them
    expected, turned = heads.clone(), heads[:, :, :3].transpose(1, 2)
    turned, _ = apply_rotary_pos_emb(turned, turned, angles.cos(), angles.sin())
    expected[:, :, :3] = turned.transpose(1, 2)
    rotate(heads, 3, angles.cos(), angles.sin())
    torch.testing.assert_close(heads, expected)


def prefilled(model, prompt: dict):
    """Logits, keys and values of a fused prefill."""
    decoder = FastDecoder()
    cache = decoder.prepare(model, len(prompt["input_ids"]), 60)
    output = decoder.prefill(model, cache, **prompt)
    length = output.past_key_values.get_seq_length()
    return output.logits[:, -1], [[each[:, :, :length] for each in pair] for pair in cache.layers]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_and_cache_are_the_models_own(load, questions, left_padded, attention):
    model = load(attn_implementation=attention).requires_grad_(False)
    batch = left_padded(questions)
    assert not batch["attention_mask"].all() and "pixel_values" in batch
    plain = model(**batch, use_cache=True, logits_to_keep=1)
    logits, cached = prefilled(model, batch)
    torch.testing.assert_close(logits, plain.logits[:, -1], atol=1e-4, rtol=1e-4)
    image_tokens = model.config.vision_config.image_tokens
    padding = (batch["attention_mask"] == 0).sum(1).tolist()
    for layer, (keys, values) in zip(plain.past_key_values.layers, cached, strict=True):
        for mine, right in ((keys, layer.keys), (values, layer.values)):
            assert mine.shape == right.shape and mine.shape[2] > image_tokens
            for row in range(len(padding)):
                torch.testing.assert_close(
                    mine[row, :, -9:], right[row, :, -9:], atol=1e-4, rtol=1e-4
                )


def test_where_three_modules_are_no_single_product_they_are_called(own, golden):
    from glm4v_nb.inference.prefill import fused

    prompt = {"input_ids": golden["text.input_ids"], "logits_to_keep": 1}
    cache = FastDecoder().prepare(own, len(prompt["input_ids"]), 60)
    with fused(own, [None] * len(own.language_model.layers)):
        found = own(**prompt, past_key_values=cache.empty()).logits
    torch.testing.assert_close(found, own(**prompt).logits, atol=1e-4, rtol=1e-4)


def test_no_further_from_float32_than_the_model_itself_in_float16(golden, load):
    inputs = {"input_ids": golden["image.input_ids"], "pixel_values": golden["vision.pixel_values"]}
    right = load()(**inputs, logits_to_keep=1).logits[:, -1].detach()
    half = GLM4VForConditionalGeneration.from_pretrained(GOLDEN, dtype=torch.float16).eval()
    half.requires_grad_(False)
    plain = half(**inputs, logits_to_keep=1).logits[:, -1]
    logits, _ = prefilled(half, inputs)
    far, plain_far = ((one.float() - right).norm().item() for one in (logits, plain))
    assert far < 1.2 * plain_far  # it rounds less often; 1.2: two prompts are few


def test_layers_are_as_before_afterwards(own, golden):
    from glm4v_nb.inference import prefill

    class Counting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    layers, calls = [own.language_model.layers[1], own.vision_tower.layers[0]], []
    add_hook_to_module(layers[0], Counting())
    before = [dict(vars(layer)) for layer in layers]
    decoder, prompt = FastDecoder(), {"input_ids": golden["text.input_ids"][:1]}
    cache = decoder.prepare(own, 1, 60)
    decoder.prefill(own, cache, **prompt)
    assert calls == layers[:1]
    assert [dict(vars(layer)) for layer in layers] == before

    def full(*_):
        assert [dict(vars(layer)) for layer in layers] != before
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(prefill, "gate", full)
        decoder.prefill(own, cache, **prompt)
    assert [dict(vars(layer)) for layer in layers] == before


def test_in_bfloat16_gelu_is_inside_the_first_product(own):
    from glm4v_nb.inference.prefill import vision_mlp

    mlp = copy.deepcopy(own.vision_tower.layers[0].mlp)
    x = torch.randn(1, 37, mlp.fc1.in_features)
    asked = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            asked.append(func is torch.ops.aten._addmm_activation.default)
            return func(*args, **(kwargs or {}))

    right = mlp(x)
    for dtype, is_inside in ((torch.float32, False), (torch.bfloat16, True)):
        asked.clear()
        mlp, x = mlp.to(dtype), x.to(dtype)
        with Noting():
            found = vision_mlp(mlp, x)
        assert any(asked) == is_inside
        torch.testing.assert_close(found.float(), right, atol=2e-2, rtol=2e-2)


def test_the_other_form_of_gelu_is_nearer_than_what_bfloat16_rounds_to():
    x = torch.linspace(-8, 8, 100_001)
    error_function = functional.gelu(x)
    apart = (error_function - functional.gelu(x, approximate="tanh")).abs()
    rounded = (error_function.bfloat16().float() - error_function).abs()
    assert apart.max() < 5e-4 < rounded[x.abs() < 2].max()


@pytest.mark.parametrize("images", [0, 1])
def test_on_a_simulated_card_it_takes_no_more_than_the_models_own(images):
    peaks = []
    for is_fused in (False, True):
        with Rig.simulated("L4", 1, ""):
            model = load_on_cards(device_map={"": 0})
            prompt = make_prompt(model, Workload(images=images, text_tokens=100))
            decoder = FastDecoder()
            cache = decoder.prepare(model, *prompt["input_ids"].shape)
            torch.cuda.reset_peak_memory_stats()
            if is_fused:
                decoder.prefill(model, cache, **prompt)
            else:
                prefill(model, prompt, past_key_values=cache.empty())
            peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= peaks[0]
