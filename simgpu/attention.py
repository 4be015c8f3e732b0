"""Attention with the kernel that CUDA picks; without a GPU torch picks the slowest.

The choice is that of aten/src/ATen/native/transformers/cuda/sdp_utils.cpp and ../sdp_utils_cpp.h at
torch 2.11, with cuDNN 9.19 as its wheels have it: cuDNN goes first on compute capability 9 and 10,
else flash attention, the memory-efficient kernel and plain products in this order. It was compared
with traces of an H100 for 116 calls (2026-11-27); what other cards pick was not measured.
"""

import math
from functools import partial

import torch
from torch.nn import functional

from simgpu.attention_scratch import CUDNN_ATTENTION_BYTES
from simgpu.device import on_card

_HALF = (torch.float16, torch.bfloat16)
_ATEN = torch.ops.aten
_UNDIVIDED_KEYS = 512


def attention(
    rig, original, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options
):
    """``scaled_dot_product_attention`` of tensors on a simulated card; others go to ``original``"""
    plain = partial(original, query, key, value, attn_mask, dropout_p, is_causal, **options)
    if not on_card(query):
        return plain()
    scale, grouped = options.get("scale"), options.get("enable_gqa", False)
    capability = rig.cards[query.device.index].compute_capability
    inputs = (query, key, value)
    needs_gradient = torch.is_grad_enabled() and any(each.requires_grad for each in inputs)
    kernel = choose_kernel(
        capability, *inputs, attn_mask, dropout_p, is_causal, grouped, needs_gradient
    )
    if kernel == "math":
        return plain()
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        choices = [query.new_empty(()) for _ in "01"]  # what ``torch.where`` chooses from
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        del choices
    if kernel == "cudnn":
        return _cudnn_attention(*inputs, attn_mask, needs_gradient, dropout_p, is_causal, scale)
    if kernel == "flash":
        features = query.shape[3]
        if features % 8:
            inputs = [functional.pad(each, (0, 8 - features % 8)) for each in inputs]
            scale = 1 / math.sqrt(features) if scale is None else scale
        output = _ATEN._scaled_dot_product_flash_attention(
            *inputs, dropout_p, is_causal, scale=scale
        )[0]
        return output[..., :features] if features % 8 else output
    if attn_mask is not None:
        length = attn_mask.shape[-1]
        if length % 8:
            attn_mask = functional.pad(attn_mask, (0, 8 - length % 8))[..., :length]
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return _ATEN._scaled_dot_product_efficient_attention(
        *inputs, attn_mask, needs_gradient, dropout_p, is_causal, scale=scale
    )[0]


def choose_kernel(
    capability: tuple[int, int],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    grouped: bool,
    needs_gradient: bool,
) -> str:
    """ "cudnn", "flash", "efficient" or "math".

    ``query``, ``key`` and ``value`` are (batch, heads, positions, width); ``grouped`` is
    ``enable_gqa``, ``capability`` the card's compute capability.
    """
    inputs = (query, key, value)
    same_types = len({each.dtype for each in inputs}) == 1
    if any(each.ndim != 4 for each in inputs) or not same_types or query.shape[0] != key.shape[0]:
        return "math"
    if not query.shape[2] or not key.shape[2] or (mask is not None and mask.stride(-1) != 1):
        return "math"
    has_rows = all(each.stride(-1) == 1 for each in inputs)
    is_narrow = query.shape[3] == 1
    heads = [each.shape[1] for each in inputs]
    same_heads = len(set(heads)) == 1
    groups = same_heads or (grouped and heads[0] % heads[1] == 0 and heads[0] % heads[2] == 0)
    on, half = torch.backends.cuda, query.dtype in _HALF
    if on.cudnn_sdp_enabled() and capability[0] in (9, 10) and half and groups:
        if (has_rows or is_narrow) and _fits_cudnn(capability, query, key, value, mask, dropout_p):
            return "cudnn"
    widths = {each.shape[3] for each in inputs}
    if on.flash_sdp_enabled() and capability >= (8, 0) and half and mask is None:
        fits = len(widths) == 1 and max(widths) <= 256 and (has_rows or is_narrow)
        fits = fits and groups and heads[1] == heads[2]
        fits = fits and not (is_causal and query.shape[2] != key.shape[2])
        if fits and not (needs_gradient and _too_wide(capability, max(widths), dropout_p)):
            return "flash"
    multiple = _multiple_of(capability, query.dtype)
    is_type = half or query.dtype is torch.float32
    if query.dtype is torch.bfloat16 and capability < (8, 0):
        is_type = False
    is_aligned = not any(width % multiple for width in widths) and query.shape[3] == key.shape[3]
    if on.mem_efficient_sdp_enabled() and is_type and is_aligned and has_rows and same_heads:
        return "efficient"
    return "math"


def _fits_cudnn(capability, query, key, value, mask, dropout_p) -> bool:
    widest = 256 if capability == (9, 0) else 128
    if capability[0] == 10 and (query.shape[3], value.shape[3]) == (192, 128):
        widest = 192
    if any(each.shape[3] > widest or each.shape[3] % 8 for each in (query, value)):
        return False
    if key.shape[2] == 1 or (dropout_p and query.shape[2] == 1):
        return False
    if mask is None:
        return True
    whole = (*query.shape[:3], key.shape[2])
    fits = zip(reversed(mask.shape), reversed(whole), strict=False)
    return not mask.requires_grad and mask.ndim in (2, 4) and all(a in (1, b) for a, b in fits)


def _too_wide(capability: tuple[int, int], width: int, dropout_p: float) -> bool:
    """For flash attention's backward pass on cards with little shared memory."""
    little = (8, 6) <= capability <= (8, 9) or (12, 0) <= capability <= (12, 1)
    return little and width > 192 and (width <= 224 or dropout_p > 0)


def _multiple_of(capability: tuple[int, int], dtype: torch.dtype) -> int:
    """What the memory-efficient kernel's widths are multiples of (``minimum_gemm_alignment``)."""
    if capability >= (8, 0) or (capability >= (7, 0) and dtype in _HALF):
        return 16 // dtype.itemsize
    return 1


def _cudnn_attention(query, key, value, mask, needs_gradient, dropout_p, is_causal, scale):
    """The kernel of Hopper cards; it keeps the sums of the softmax only for a backward pass.

    Its output lies in memory as the query does: behind the image tower's fused projection by
    position, so that the next product takes it as it is; behind the decoder's rotation by head, so
    that transformers copies it.
    """
    batch, heads, positions, features = query.shape
    random = []
    if needs_gradient:
        output = _ATEN._scaled_dot_product_cudnn_attention(
            query, key, value, mask, True, dropout_p, is_causal, False, scale=scale
        )[0]
    else:
        for _ in ("seed", "offset"):
            random.append(torch.empty((), dtype=torch.int64, device=query.device))
        same_width = value.shape[3] == features
        output = torch.empty_like(query) if same_width else _laid_out_as(query, value.shape[3])
    size = CUDNN_ATTENTION_BYTES
    if positions == 1:
        # Per split: the weighted values, the largest score and the sum, in float32.
        splits = 1 if mask is not None else _decode_splits(batch * key.shape[1], key.shape[2])
        lines = batch * heads * splits * (features + 2) * 4
        size = lines + CUDNN_ATTENTION_BYTES // 2 if splits > 1 else 0
    if size:
        torch.empty(size, dtype=torch.uint8, device=query.device)  # the workspace, gone at once
    del random
    return output


def _decode_splits(groups: int, keys: int) -> int:
    """Among how many blocks cuDNN divides the keys of one query position: a power of two, so that
    each has 128 keys and all of them fill the card twice; as traced of 1 to 512 groups."""
    if keys <= _UNDIVIDED_KEYS:
        return 1
    return 1 << (max(1, min(keys // 128, 256 // groups)).bit_length() - 1)


def _laid_out_as(query: torch.Tensor, width: int) -> torch.Tensor:
    """An empty tensor of another width whose dimensions lie in memory as the query's."""
    order = sorted(range(4), key=lambda dim: -query.stride(dim))
    shape = (*query.shape[:3], width)
    empty = torch.empty([shape[dim] for dim in order], dtype=query.dtype, device=query.device)
    return empty.permute([order.index(dim) for dim in range(4)])
