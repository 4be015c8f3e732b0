"""What the kernels of attention take on CUDA besides their results.

Read in aten/src/ATen/native/transformers/cuda: attention.cu, attention_backward.cu,
flash_attn/flash_api.cpp and mem_eff_attention; cuDNN's are as traced. All were compared with traces
of an H100 (torch 2.11, 2026-11-27), flash attention and the memory-efficient kernel made to run.
Sizes and rules are those of ``scratch``.
"""

import torch

from simgpu.sorting import Early

# What cuDNN's attention keeps while it runs, besides seed and offset of its random numbers.
CUDNN_ATTENTION_BYTES = 256
# Keys that flash attention multiplies at a time, by the width of a head.
_FLASH_KEYS = ((64, 256), (128, 128), (256, 64))


def cudnn_backward(a, results, card):
    """The query's gradient and sums in float32; per head gradients of shared keys and values."""
    query, key, value = a["query"], a["key"], a["value"]
    batch, heads, positions, features = query.shape
    size = batch * heads * positions * (features + 1) * 4 + CUDNN_ATTENTION_BYTES
    if key.shape[1] != heads:
        size += batch * heads * key.shape[2] * (features + value.shape[3]) * query.element_size()
    return [size]


def efficient_backward(a, results, card):
    """The kernel's workspace in float32 (kernel_backward.h: the gradients of keys and values, or
    of queries in half precision), and the sum of gradient times output of each query."""
    query, key, value = a["query"], a["key"], a["value"]
    batch, heads, positions, _ = query.shape
    sums, lines = batch * heads * positions * 4, -(-positions // 16) * 16
    workspace = lines * -(-query.shape[3] // 64) * 64 * 4 * batch * heads
    if query.shape[3] > 128 and query.element_size() == 2:
        keys = -(-key.shape[2] // 64) * 64 * 4 * batch * heads
        workspace += keys * 2 * max(key.shape[3], value.shape[3])
    product = [a["out"].nbytes, sums, sums] if query.dtype is torch.float32 else []
    gradient = a["grad_out_"]
    moved = [] if gradient.transpose(1, 2).is_contiguous() else [gradient.nbytes]
    return [Early(moved), product, sums, workspace + sums // 16]


def efficient_forward(a, results, card):
    """Values of wide heads in half precision are added up in float32 (kernel_forward.h)."""
    output = results[0]
    is_wide = max(a["query"].shape[3], output.shape[3]) > 128 and output.element_size() == 2
    return [2 * output.nbytes] if is_wide else []


def flash_forward(a, results, card):
    """Partial results where the keys are divided among blocks (``num_splits_heuristic`` in
    flash_api.cpp), as they are where there are few queries."""
    query, key = a["query"], a["key"]
    batch, heads, positions, features = query.shape
    if positions == 1 and heads > key.shape[1]:  # heads that share keys become positions
        positions, heads = heads // key.shape[1], key.shape[1]
    width = -(-features // 32) * 32
    by_keys = next(size for most, size in _FLASH_KEYS if width <= most)
    key_blocks = -(-key.shape[2] // by_keys)
    blocks, at_once = batch * heads * -(-positions // 64), 2 * card.multiprocessors
    most = min(128, at_once, key_blocks)
    if a["dropout_p"] or blocks >= 0.8 * at_once or most <= 1:
        return []
    # Dividing further is of no use where a block gets as many keys as before.
    useful = [
        n for n in range(1, most + 1) if n == 1 or -(-key_blocks // n) != -(-key_blocks // (n - 1))
    ]
    filled = {n: n * blocks / at_once / -(-n * blocks // at_once) for n in useful}
    splits = next(n for n in useful if filled[n] >= 0.85 * max(filled.values()))
    if splits == 1:
        return []
    lines = splits * batch * heads * positions * 4
    return [lines, lines * width]


def flash_backward(a, results, card):
    """Gradient and result by position, sums, and the query's gradient in float32, whose width is a
    multiple of 32 and whose positions of 128 (flash_api.cpp)."""
    query = a["query"]
    batch, heads, positions, features = query.shape
    lines, width = -(-positions // 128) * 128, -(-features // 32) * 32
    shared = a["key"].shape[1] != heads
    expanded = [batch * heads * a["key"].shape[2] * features * query.itemsize] * 2 if shared else []
    moved = [each for each in (a["grad_out"], a["out"]) if not each.transpose(1, 2).is_contiguous()]
    return [
        *(each.nbytes for each in moved),
        4 * batch * heads * lines,
        4 * batch * heads * lines * width,
        *expanded,
    ]
