"""What CUDA's kernels allocate beyond their results: which is chosen, and what it needs.

Shape rules know results only. The rest was read off traces of PyTorch's allocator on H100 and H200
(torch 2.11, 2026-11-25 and -26; ``benchmarks/memory.py --trace``) and in PyTorch's sources: for the
choice of kernels aten/src/ATen/ native/transformers/cuda, for sums
aten/src/ATen/native/cuda/Reduce.cuh.
"""

import math
from functools import partial

import torch

from simgpu.catalog import Card
from simgpu.device import on_card
from simgpu.rules import channels_last_strides
from simgpu.units import MIB

# What cuDNN's attention keeps while it runs, besides seed and offset of its random numbers.
_CUDNN_ATTENTION_BYTES = 256
# With one query position it divides the keys among so many blocks, each with its own sums.
_DECODE_SPLITS = 8
# Operators that call cuBLAS, whose workspace PyTorch keeps, one per device and thread.
MATRIX_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear"}
# With a bias it is cublasLt, with a workspace of its own: _parseCUDABlasLtWorkspaceSize().
WITH_BIAS = {"aten::addmm"}
CUBLASLT_WORKSPACE_BYTES = 2**20
# Kernels are loaded when they are first used, and some of their memory lies among PyTorch's
# segments: cuBLAS's with the first matrix product; some by the decoder's first normalisation; some
# in each decoding of another size that goes on for long. The last are not loaded after 7 steps and
# are after 63; what they are is not known, and more than three sizes were not measured.
CUBLAS_KERNELS, NORM_KERNELS, DECODE_KERNELS = [64 * MIB], [2 * MIB], [2 * MIB] * 3
LONG_DECODE, DECODE_SIZES = 16, 3

# Threads a multiprocessor holds at a time, by compute capability; 2048 on the others (CUDA C++
# Programming Guide, table of technical specifications).
_RESIDENT_THREADS = {(7, 5): 1024, (8, 6): 1536, (8, 9): 1536, (12, 0): 1536}
_REDUCTION_THREADS, _WARP, _VECTOR = 512, 32, 4


def scratch_bytes(name: str, arguments: tuple, card: Card) -> list[int]:
    """What the kernel of an operator, as "aten::sum", takes in this order besides its result."""
    if name == "aten::sum":
        return _sum_scratch(arguments[0], arguments[1] if len(arguments) > 1 else None, card)
    if name == "aten::_scaled_dot_product_cudnn_attention_backward":
        return [_attention_backward_bytes(*arguments[1:4])]
    if name == "aten::embedding_dense_backward":
        return _embedding_backward_scratch(*arguments[:3])
    return []


def _embedding_backward_scratch(gradient, indices, rows: int) -> list[int]:
    """Indices are sorted, gradients added in pieces of ten (EmbeddingBackwardKernel.cu)."""
    count = indices.numel()
    if count <= 3072:
        return []
    pieces = count // 10 + min(count, rows)
    return [*[8 * count] * 4, 8 * pieces, 4 * pieces * gradient.shape[-1]]


def _attention_backward_bytes(query, key, value) -> int:
    """The query's gradient and sums in float32; per head gradients of shared keys and values."""
    batch, heads, positions, features = query.shape
    size = batch * heads * positions * (features + 1) * 4 + _CUDNN_ATTENTION_BYTES
    if key.shape[1] != heads:
        size += batch * heads * key.shape[2] * (features + value.shape[3]) * query.element_size()
    return size


def _sum_scratch(tensor: torch.Tensor, dims, card: Card) -> list[int]:
    """Partial sums and their counters, where the blocks of a grid share the work on one sum."""
    if not tensor.numel():
        return []
    every = list(range(tensor.ndim))
    reduced = sorted(dim % tensor.ndim for dim in dims) if dims else every
    over_positions = tensor.ndim == 4 and reduced == [0, 2, 3]
    layout = torch.channels_last if over_positions else torch.contiguous_format
    if not tensor.is_contiguous(memory_format=layout):
        return []
    inputs = math.prod(tensor.shape[dim] for dim in reduced)
    outputs = tensor.numel() // inputs
    along_rows = reduced == every[len(every) - len(reduced) :]
    if not along_rows and not over_positions and reduced != every[: len(reduced)]:
        return []  # dimensions in the middle: not traced
    return _reduction(outputs, inputs, along_rows, max(4, tensor.element_size()), card)


def _reduction(
    outputs: int, inputs: int, along_rows: bool, accumulated: int, card: Card
) -> list[int]:
    """Bytes of partial sums and counters, as ``setReduceConfig`` of Reduce.cuh divides the work.

    ``along_rows``: the summed numbers lie side by side. ``accumulated``: bytes of one partial sum.
    """
    vector = 1
    if along_rows:
        width, height = (inputs // _VECTOR if outputs == 1 and inputs > 128 else inputs), outputs
    else:
        while outputs % (2 * vector) == 0 and vector < _VECTOR:
            vector *= 2
        width, height = outputs // vector, inputs
    threads = _REDUCTION_THREADS // vector
    width, height = (min(1 << (size.bit_length() - 1), threads) for size in (width, height))
    block_width = min(width, _WARP)
    block_height = min(height, threads // block_width)
    block_width = min(width, threads // block_height)
    step_input, step_output = (block_width, 1) if along_rows else (1, block_width)
    if math.ceil(inputs / step_input) < min(16 * block_height, 256):
        return []  # one block does it alone
    step_input *= block_height
    values = math.ceil(inputs / step_input)
    resident = _RESIDENT_THREADS.get(card.compute_capability, 2048)
    target = card.multiprocessors * (resident // (block_width * block_height))
    grid = math.ceil(outputs // vector / step_output)
    if values < 256 or grid > target:
        return []
    blocks = max(min(math.ceil(target / grid), math.ceil(values / 16)), math.ceil(values / 256))
    if blocks == 1:
        return []
    partial = accumulated * outputs * blocks * (1 if along_rows else block_width * vector)
    return [partial, 4 * grid]


def attention(
    rig, original, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options
):
    """Attention with the kernel CUDA picks; without a GPU torch picks the slowest."""
    plain = partial(original, query, key, value, attn_mask, dropout_p, is_causal, **options)
    if not on_card(query):
        return plain()
    capability, scale = rig.cards[query.device.index].compute_capability, options.get("scale")
    has_flash = capability >= (8, 0)
    half = query.dtype in (torch.float16, torch.bfloat16)
    needs_gradient = torch.is_grad_enabled() and query.requires_grad
    if attn_mask is None and half and capability[0] in (9, 10):
        return _cudnn_attention(query, key, value, needs_gradient, dropout_p, is_causal, scale)
    if attn_mask is None and half and has_flash:
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
    grouped = query.shape[1] != key.shape[1]
    if grouped or (query.dtype is torch.bfloat16 and not has_flash):
        return plain()  # which neither the flash nor the memory-efficient kernel takes
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, needs_gradient, dropout_p, is_causal, scale=scale
    )[0]


def _cudnn_attention(query, key, value, needs_gradient, dropout_p, is_causal, scale):
    """The kernel of Hopper cards; it keeps the sums of the softmax only for a backward pass.

    Its output lies in memory as the query does: behind the image tower's fused projection by
    position, so that the next product takes it as it is; behind the decoder's rotation by head, so
    that transformers copies it.
    """
    batch, heads, positions, features = query.shape
    random = []
    if needs_gradient:
        output = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, dropout_p, is_causal, False, scale=scale
        )[0]
    else:
        for _ in ("seed", "offset"):
            random.append(torch.empty((), dtype=torch.int64, device=query.device))
        output = torch.empty_like(query)
        if value.shape[3] != features:
            output = query.new_empty(*query.shape[:3], value.shape[3])
    size = _CUDNN_ATTENTION_BYTES
    if positions == 1 and key.shape[2] > 1:
        # Per split: the weighted values, the largest score and the sum, in float32.
        size = batch * heads * _DECODE_SPLITS * (features + 2) * 4 + _CUDNN_ATTENTION_BYTES // 2
    torch.empty(size, dtype=torch.uint8, device=query.device)  # the workspace, gone at once
    del random
    return output


def convolution(_, original, input, weight, *settings, **options):
    """``conv2d`` as cuDNN runs it: in the input's layout, in float32 on transposed copies."""
    if not on_card(input):
        return original(input, weight, *settings, **options)
    channels_last = input.stride(1) == 1 and input.shape[1] > 1
    if channels_last:
        input = input.contiguous(memory_format=torch.channels_last)
    output = original(input, weight, *settings, **options)
    transposed = None
    if channels_last:
        if not output.requires_grad:
            # The shape rule does not know that the result is channels-last; it has no views yet.
            output = output.as_strided_(output.shape, channels_last_strides(output.shape))
        transposed = weight.detach().contiguous(memory_format=torch.channels_last)
    if input.dtype is torch.float32:
        copies = (input, weight) if channels_last else (input, weight, output)
        size = sum(tensor.nbytes for tensor in copies) + 16
        torch.empty(size, dtype=torch.uint8, device=input.device)  # the workspace, gone at once
    del transposed
    return output
