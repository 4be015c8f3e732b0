"""Which models the fused kernels run: they read weights, and call none of the modules around."""

from operator import attrgetter

import torch
from torch import nn
from transformers.models.glm.modeling_glm import GlmRMSNorm

from glm4v_nb.inference.weights import bits_of
from simgpu.kernels import launching

_PRODUCTS = [f"self_attn.{name}_proj" for name in "qkvo"] + ["mlp.gate_up_proj", "mlp.down_proj"]
_NORMS = ["input_layernorm", "post_attention_layernorm"]


def why_not(model) -> str | None:
    """Why the kernels cannot run this model where it is, in a few words; None if they can."""
    launched = launching(model.lm_head.weight)
    if not launched:
        return "Triton is not installed, which comes with PyTorch for CUDA on Linux"
    decoder, layers = model.language_model, model.language_model.layers
    products = [one for layer in layers for one in attrgetter(*_PRODUCTS)(layer)]
    products += [model.lm_head, decoder.embed_tokens]
    norms = [one for layer in layers for one in attrgetter(*_NORMS)(layer)] + [decoder.norm]
    return (
        _changed(model, products, norms)
        or _weights_not_read(layers, products, norms)
        or _nowhere_to_run(model, products, launched)
    )


def _changed(model, products, norms) -> str | None:
    """What a module does beside its product or norm, which the kernels would pass over."""
    # Those that several processes share have ranks, over which a step adds up.
    plain = nn.Linear, nn.Embedding
    for one in products:
        if type(one) not in plain and not hasattr(one, "ranks"):
            library = type(one).__module__.partition(".")[0]
            return (
                f"a weight is in a {type(one).__name__} of {library}, as of quantisation or an"
                " adapter"
            )
    for one in norms:
        if type(one) is not GlmRMSNorm:
            return f"a norm is a {type(one).__name__}, as of an adapter"
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return "an adapter puts tokens of its own in front of the prompt"
    biased = [one for one in products if getattr(one, "bias", None) is not None]
    if len(biased) != 3 * len(model.language_model.layers):  # of queries, keys and values
        return "there are biases elsewhere than at queries, keys and values, or none there"
    for name, module in model.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        # transformers' own record, or ask for gradients.
        if any(not (hook.__module__ or "").startswith("transformers.") for hook in hooks):
            return f"{name or 'the model'} has a forward hook, which they would pass over"
        is_replaced = "forward" in vars(module) and not hasattr(module, "_hf_hook")
        if is_replaced or module._compiled_call_impl is not None:
            return f"{name or 'the model'} has another forward, or is compiled"
    return None


def _weights_not_read(layers, products, norms) -> str | None:
    weights = [one.weight for one in products]
    packed = next((one for one in weights if bits_of(one) is None), None)
    if packed is not None:
        blocks = f" in blocks of {packed.block_size}" if hasattr(packed, "block_size") else ""
        return (
            f"a weight is of type {type(packed).__name__}{blocks}, as of quantisation (there are"
            " kernels for torchao's int8 with a scale a row, and int4 with one for 128 columns)"
        )
    plain = [one for one in weights if bits_of(one) == 16] + [one.weight for one in norms]
    if not all(one.is_contiguous() for one in plain):
        return "a weight's numbers do not lie in a row (call contiguous() on it)"
    if bits_of(weights[-1]) != 16:
        return "the embedding is quantised"
    for name in _PRODUCTS:  # those of one kernel, which has one tile for all
        bits = sorted({bits_of(attrgetter(name)(layer).weight) for layer in layers})
        if len(bits) > 1:
            return f"layers have {name} of {' and '.join(map(str, bits))} bits"
    dtypes = {one.dtype for one in weights}
    if len(dtypes) > 1:
        return f"the weights are of several types ({', '.join(sorted(map(str, dtypes)))})"
    if dtypes == {torch.float64}:
        return "the weights are of torch.float64 (load in bfloat16, float16 or float32)"
    return None


def _nowhere_to_run(model, products, launched: str) -> str | None:
    weights = [one.weight for one in products]
    devices = {one.device for one in weights}
    if any(one.type == "meta" for one in devices):
        return "weights are offloaded"
    config, interpreted = model.config.text_config, launched == "interpreted"
    if interpreted and weights[0].dtype is torch.bfloat16:
        return "Triton's interpreter multiplies no bfloat16 (load in float32 or float16)"
    if not interpreted and any(one.type != "cuda" for one in devices):
        return "weights are on the CPU"
    if not interpreted and any(torch.cuda.get_device_capability(one) < (8, 0) for one in devices):
        return "a card is older than Ampere"
    if config.head_dim < 16 or config.head_dim & (config.head_dim - 1):
        return f"head_dim is {config.head_dim}, no power of two from 16"
    decoder, layers = model.language_model, model.language_model.layers
    first, last = layers[0].mlp.down_proj, layers[-1].mlp.down_proj
    beside = (first, decoder.embed_tokens), (last, decoder.norm), (last, model.lm_head)
    if any(one.weight.device != other.weight.device for one, other in beside):
        return "embedding, norm or head is on another card than the layer beside it"
    return None
