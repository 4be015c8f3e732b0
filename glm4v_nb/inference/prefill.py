"""The model's own prefill, with fused kernels between its products.

Everything around the layers (embeddings, the image's place, masks, devices) stays the model's own,
and so does every product: only the layers' ``forward`` is another while ``fused`` lasts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm.modeling_glm import eager_attention_forward

from glm4v_nb.inference import prefill_kernels as kernels
from glm4v_nb.model.quantising import parts_of
from simgpu.kernels import launching

# What a program takes at a time; interpreted programs cost milliseconds, whatever their size.
ROWS = {"compiled": 1, "interpreted": 64}
COLUMNS, HEADS = 2048, 16

# Weight and bias of the product that gives a layer's queries, keys and values.
Heads = tuple[torch.Tensor, torch.Tensor]


@contextmanager
def fused(model, heads: Sequence[Heads | None]) -> Iterator[None]:
    """While it lasts, the model's layers run with fused kernels; for inference alone.

    ``heads`` are those of the decoder's layers, in order; without them a layer's own three modules
    are called. Layers of the image tower that are offloaded stay as they are.
    """
    others = []
    for layer, product in zip(model.language_model.layers, heads, strict=True):
        others.append((layer, partial(decoder_layer, layer, product)))
    for layer in model.vision_tower.layers:
        if not layer.input_layernorm.weight.is_meta:
            others.append((layer, partial(vision_layer, layer)))
    before = []
    try:
        for layer, forward in others:
            forward = partial(_on_its_card, forward)
            # Hooks of accelerate are around the layer's own, which they keep under this name.
            name = "_old_forward" if hasattr(layer, "_old_forward") else "forward"
            before.append((layer, name, vars(layer).get(name)))
            setattr(layer, name, forward)
        yield
    finally:
        for layer, name, forward in before:
            delattr(layer, name)
            if forward is not None:
                setattr(layer, name, forward)


def _on_its_card(forward, hidden_states: torch.Tensor, *args, **options) -> torch.Tensor:
    # Triton launches on the current card, which another's tensors need not be ready for.
    with torch.cuda.device_of(hidden_states):
        return forward(hidden_states, *args, **options)


def decoder_layer(
    layer: nn.Module,
    product: Heads | None,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    past_key_values=None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **options,
) -> torch.Tensor:
    """As the forward of a ``GlmDecoderLayer``: (batch, positions, hidden) to the same."""
    attention, mlp = layer.self_attn, layer.mlp
    depth, shape = attention.head_dim, hidden_states.shape[:-1]
    _, normed = add_rms_norm(hidden_states, None, layer.input_layernorm)
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    if product is None:
        heads = torch.cat([project(normed) for project in projections], dim=-1)
    else:
        heads = functional.linear(normed, *product)
    heads = heads.view(*shape, -1, depth)
    counts = [project.out_features // depth for project in projections]
    rotate(heads, counts[0] + counts[1], *position_embeddings)
    query, *pair = (each.transpose(1, 2) for each in heads.split(counts, dim=2))
    pair = past_key_values.update(*pair, attention.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(
        attention.config._attn_implementation, eager_attention_forward
    )
    attended, _ = attend(
        attention, query, *pair, attention_mask, scaling=attention.scaling, **options
    )
    del heads, query, pair, normed
    attended = attention.o_proj(attended.reshape(*shape, -1))
    hidden_states, normed = add_rms_norm(hidden_states, attended, layer.post_attention_layernorm)
    del attended
    return hidden_states.add_(mlp.down_proj(gate(mlp.gate_up_proj(normed))))


def vision_layer(layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """As the forward of a ``GLM4VVisionLayer``: (images, patches, hidden) to the same."""
    attended = layer.attention(hidden_states)
    hidden_states = layer_norm_add(hidden_states, attended, layer.input_layernorm)
    del attended
    output = vision_mlp(layer.mlp, hidden_states)
    return layer_norm_add(hidden_states, output, layer.post_attention_layernorm)


def vision_mlp(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """As the forward of a ``GLM4VVisionMLP``, in bfloat16 with GELU inside the first product.

    On CUDA that is GELU's form with a hyperbolic tangent, at most 5e-4 from the one with the error
    function, where bfloat16 rounds numbers near 1 by as much as 4e-3, which is done once less.
    """
    first = mlp.fc1
    is_plain = type(first) is nn.Linear and parts_of(first.weight)[0] is first.weight
    if not is_plain or x.dtype is not torch.bfloat16 or mlp.config.hidden_act != "gelu":
        return mlp(x)
    rows = x.flatten(0, -2)
    hidden = torch._addmm_activation(first.bias, rows, first.weight.t(), use_gelu=True)
    return mlp.fc2(hidden.view(*x.shape[:-1], -1))


def add_rms_norm(x: torch.Tensor, delta: torch.Tensor | None, norm: nn.Module):
    """The sum of both, (..., features), and its norm; x itself and its norm without ``delta``."""
    x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x if delta is None else torch.empty_like(x)
    features, rows = x.shape[-1], ROWS[launching(x)]
    count = x.numel() // features
    kernels.add_rms_norm[(-(-count // rows),)](
        x, x if delta is None else delta, norm.weight, total, y, count, K=features, R=rows,
        BK=power_of_two(features), ADD=delta is not None, EPSILON=norm.variance_epsilon,
        num_warps=4,
    )  # fmt: skip
    return total, y


def layer_norm_add(x: torch.Tensor, delta: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    """x plus the normalised ``delta``, both (..., features)."""
    x, delta = x.contiguous(), delta.contiguous()
    y, features, rows = torch.empty_like(x), x.shape[-1], ROWS[launching(x)]
    count = x.numel() // features
    kernels.layer_norm_add[(-(-count // rows),)](
        x, delta, norm.weight, norm.bias, y, count, K=features, R=rows,
        BK=power_of_two(features), EPSILON=norm.eps, num_warps=4,
    )  # fmt: skip
    return y


def gate(both: torch.Tensor) -> torch.Tensor:
    """silu(first half) times second half: (..., 2 features) to (..., features)."""
    features, rows = both.shape[-1] // 2, ROWS[launching(both)]
    y = both.new_empty(*both.shape[:-1], features)
    count = y.numel() // features
    kernels.gate[(-(-count // rows), -(-features // COLUMNS))](
        both, y, count, K=features, R=rows, BK=COLUMNS, num_warps=4
    )
    return y


def rotate(heads: torch.Tensor, turned: int, cosines: torch.Tensor, sines: torch.Tensor):
    """Turn the first so many of (batch, positions, heads, depth) in place by their positions'
    angles, each (batch or 1, positions, rotary)."""
    *shape, count, depth = heads.shape
    angles = [each.expand(*shape, -1).contiguous() for each in (cosines, sines)]
    rows, positions = ROWS[launching(heads)], heads.numel() // (count * depth)
    kernels.rotate[(-(-positions // rows), -(-turned // HEADS))](
        heads, *angles, positions, HEADS=count, D=depth, TURNED=turned, H=HEADS,
        ROTARY=angles[0].shape[-1], R=rows, num_warps=4,
    )  # fmt: skip


def power_of_two(number: int) -> int:
    """The smallest one that is not less."""
    return 1 << (number - 1).bit_length()
