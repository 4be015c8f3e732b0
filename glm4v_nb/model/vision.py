"""The image tower: an EVA2-CLIP-E encoder, a convolution that halves its grid, a projector.

Every parameter belongs to a module whose ``forward`` uses it, and every module with a residual
connection is listed as unsplittable in ``modeling.py``. accelerate moves weights per module, so
this is what lets the tower run with parts of it on the CPU or on disk.
"""

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPMLP

from glm4v_nb.model.configuration import GLM4VConfig, GLM4VVisionConfig


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out; query, key, value: (batch, heads, length, features); no mask."""
    weights = torch.softmax(query @ key.transpose(-1, -2) * scaling, -1, dtype=torch.float32)
    weights = weights.to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class GLM4VPatchEmbedding(nn.Module):
    """Images (batch, channels, side, side) to (batch, 1 + patches, hidden), CLS first."""

    def __init__(self, config: GLM4VVisionConfig):
        super().__init__()
        channels, patch = config.in_channels, config.patch_size
        self.proj = nn.Conv2d(channels, config.hidden_size, patch, stride=patch)
        self.cls_embedding = nn.Parameter(torch.zeros(1, config.hidden_size))
        self.position_embedding = nn.Embedding(config.num_positions, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.proj(pixel_values).flatten(2).transpose(1, 2)
        cls = self.cls_embedding.expand(patches.shape[0], 1, -1)
        embeddings = torch.cat((cls, patches), dim=1)
        # The module is called, not its weight read: an offloaded one is only there in the call.
        positions = torch.arange(embeddings.shape[1], device=embeddings.device)
        return embeddings + self.position_embedding(positions)


class GLM4VVisionAttention(nn.Module):
    """Full (not causal) attention over all patches; query, key and value in one projection."""

    def __init__(self, config: GLM4VConfig):
        super().__init__()
        vision = config.vision_config
        # The whole model's: it names the attention implementation, also after a change.
        self.config = config
        self.head_size = vision.hidden_size // vision.num_heads
        self.scaling = self.head_size**-0.5
        self.is_causal = False
        self.query_key_value = nn.Linear(vision.hidden_size, 3 * vision.hidden_size)
        self.dense = nn.Linear(vision.hidden_size, vision.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, length, _ = hidden_states.shape
        fused = self.query_key_value(hidden_states).view(batch, length, 3, -1, self.head_size)
        query, key, value = fused.permute(2, 0, 3, 1, 4)
        chosen = self.config._attn_implementation
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(chosen, eager_attention)
        output, _ = attention(self, query, key, value, None, scaling=self.scaling, is_causal=False)
        return self.dense(output.reshape(batch, length, -1))


class GLM4VVisionMLP(CLIPMLP):
    """Two projections with an activation between, (batch, length, hidden) to the same."""


class GLM4VVisionLayer(GradientCheckpointingLayer):
    """One encoder block. Unlike most transformers it normalises *after* each sublayer."""

    def __init__(self, config: GLM4VConfig):
        super().__init__()
        vision = config.vision_config
        self.input_layernorm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)
        self.attention = GLM4VVisionAttention(config)
        self.post_attention_layernorm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)
        self.mlp = GLM4VVisionMLP(vision)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.input_layernorm(self.attention(hidden_states))
        return hidden_states + self.post_attention_layernorm(self.mlp(hidden_states))


class GLM4VProjector(nn.Module):
    """Gated projection of (batch, patches, decoder hidden) into the decoder's embedding space."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.linear_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-5)
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.dense_h_to_4h = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.dense_4h_to_h = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = functional.gelu(self.norm1(self.linear_proj(hidden_states)))
        gated = functional.silu(self.gate_proj(hidden_states)) * self.dense_h_to_4h(hidden_states)
        return self.dense_4h_to_h(gated)


class GLM4VImageBoundary(nn.Module):
    """Learned begin- and end-of-image vectors around the patches, all divided by a constant."""

    def __init__(self, hidden_size: int, scaling_factor: float):
        super().__init__()
        self.scaling_factor = scaling_factor
        self.boi = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.eoi = nn.Parameter(torch.zeros(1, 1, hidden_size))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        begin, end = (vector.expand(len(patches), -1, -1) for vector in (self.boi, self.eoi))
        return torch.cat((begin, patches, end), dim=1) / self.scaling_factor


class GLM4VVisionTower(nn.Module):
    """Images (batch, 3, side, side) to features (batch, image_tokens, decoder hidden)."""

    def __init__(self, config: GLM4VConfig):
        super().__init__()
        vision = config.vision_config
        self.patches_per_side = vision.patches_per_side
        self.patch_embedding = GLM4VPatchEmbedding(vision)
        layers = (GLM4VVisionLayer(config) for _ in range(vision.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.conv = nn.Conv2d(vision.hidden_size, config.hidden_size, kernel_size=2, stride=2)
        self.linear_proj = GLM4VProjector(config.hidden_size, config.ffn_hidden_size)
        self.boundary = GLM4VImageBoundary(config.hidden_size, vision.scaling_factor)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden_states = self.patch_embedding(pixel_values)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        patches, side = hidden_states[:, 1:], self.patches_per_side
        grid = patches.view(len(patches), side, side, -1).permute(0, 3, 1, 2)
        halved = self.conv(grid).flatten(2).transpose(1, 2)
        return self.boundary(self.linear_proj(halved))
