"""What a sum, a mean, a maximum or a variance takes on CUDA besides its result.

Where one block of threads cannot do a result alone, the blocks leave partial results and counters
in memory. How the work is divided is re-enacted from PyTorch's sources: dimensions are sorted and
merged by aten/src/ATen/TensorIterator.cpp, divided by ``setReduceConfig`` in
aten/src/ATen/native/cuda/Reduce.cuh; what one partial result is says each Reduce*Kernel.cu.
"""

import math

import torch

from simgpu.catalog import Card

# Threads a multiprocessor holds at a time, by compute capability; 2048 on the others (CUDA C++
# Programming Guide, table of technical specifications).
_RESIDENT_THREADS = {(7, 5): 1024, (8, 6): 1536, (8, 9): 1536, (12, 0): 1536}
_THREADS, _WARP, _VECTOR = 512, 32, 4
_HALF = (torch.float16, torch.bfloat16)
# Of a pair of value and index, and of mean, squares and counts of a variance (of float64: 24).
_PAIR, _WELFORD = 16, 16
# Operators that turn their argument into the type of the result before they add it up.
_CASTING = {"sum", "nansum", "prod", "mean", "linalg_vector_norm", "norm"}
_OF_VARIANCE = {"std", "var", "std_mean", "var_mean"}
_WITH_PLACES = {"argmax", "argmin"}
REDUCTIONS = {"amax", "amin", "max", "min", "all", "any", "aminmax"}
REDUCTIONS |= _CASTING | _OF_VARIANCE | _WITH_PLACES


def reduction_scratch(name: str, arguments: dict, results: list, card: Card) -> list[int]:
    """Bytes that a reduction takes, in this order; ``name`` is one of ``REDUCTIONS``."""
    tensor, dims = arguments["self"], arguments.get("dim")
    if dims is None or isinstance(dims, bool):  # "unbiased" is called so in one overload
        dims = []
    taken, result = [], results[0]
    dtype = tensor.dtype
    if name in _CASTING and result.dtype != dtype:
        if not (dtype in _HALF and result.dtype is torch.float32):
            dtype = result.dtype
            taken.append(tensor.numel() * dtype.itemsize)
    size = _partial_bytes(name, dtype, len(results))
    strides = tensor.stride() if not taken else torch.empty(tensor.shape, device="meta").stride()
    return taken + partial_results(
        (tensor.shape, strides, tensor.storage_offset() if not taken else 0),
        [dims] if isinstance(dims, int) else dims,
        size,
        card,
        vector=2 if name in _OF_VARIANCE else _VECTOR,
    )


def _partial_bytes(name: str, dtype: torch.dtype, results: int) -> int:
    if name in _OF_VARIANCE:
        return 24 if dtype is torch.float64 else _WELFORD
    if name in _WITH_PLACES or (name in ("max", "min") and results == 2):
        return _PAIR
    if name == "aminmax":
        return 2 * dtype.itemsize
    return max(4, dtype.itemsize) if name in _CASTING else dtype.itemsize


def _iterated(layout: tuple, reduced: set[int]) -> list[tuple[int, int, bool]]:
    """Size, stride and whether it is reduced of each dimension, as TensorIterator goes through
    them: the reduced first, each part from the smallest stride, neighbours merged."""
    shape, strides, _ = layout
    parts = ([], [])
    for dim in reversed(range(len(shape))):
        if shape[dim] != 1:
            parts[dim not in reduced].append((shape[dim], strides[dim], dim in reduced))
    merged = []
    # The others are in the order of the result, which is contiguous.
    for size, stride, is_reduced in sorted(parts[0], key=lambda part: part[1]) + parts[1]:
        if merged and merged[-1][2] == is_reduced and merged[-1][0] * merged[-1][1] == stride:
            merged[-1] = (merged[-1][0] * size, merged[-1][1], is_reduced)
        else:
            merged.append((size, stride, is_reduced))
    return merged


def partial_results(layout: tuple, dims, size: int, card: Card, vector: int = _VECTOR) -> list[int]:
    """Bytes of partial results and counters; none where every result is one block's.

    Args:
        layout: shape, strides and offset of the tensor.
        dims: those that are reduced; all where there are none.
        size: bytes of one partial result.
        vector: how many neighbours a thread reads at a time along what is reduced.
    """
    shape, _, offset = layout
    if not math.prod(shape):
        return []
    every = range(len(shape))
    reduced = {dim % len(shape) for dim in dims} if dims and len(shape) else set(every)
    iterated = _iterated(layout, reduced)
    inputs = math.prod(shape[dim] for dim in reduced)
    outputs = math.prod(shape) // inputs
    count = sum(is_reduced for *_, is_reduced in iterated)
    along_rows = count == len(iterated) or (count and iterated[0][1] < iterated[count][1])
    if not count:
        return []
    per_output = 1
    if along_rows:
        width, height = inputs, outputs
        if iterated[0][1] == 1 and width >= 128 and count == 1:
            width //= vector
    else:
        if iterated[count][1] == 1:
            per_output = _VECTOR
            lengths = [offset, iterated[count][0]]
            lengths += [stride for at, (_, stride, _) in enumerate(iterated) if at != count]
            while any(length % per_output for length in lengths):
                per_output //= 2
        width, height = outputs // per_output, inputs
    return _shared_work(outputs, inputs, (width, height), along_rows, per_output, size, card)


def _shared_work(outputs, inputs, extent, along_rows, per_output, size, card) -> list[int]:
    """``setReduceConfig`` from the block's dimensions on."""
    threads = _THREADS // per_output
    width, height = (min(1 << (length.bit_length() - 1), threads) for length in extent)
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
    grid = math.ceil(outputs // per_output / step_output)
    if values < 256 or grid > target:
        return []
    blocks = max(min(math.ceil(target / grid), math.ceil(values / 16)), math.ceil(values / 256))
    if blocks == 1:
        return []
    partial = size * outputs * blocks * (1 if along_rows else block_width * per_output)
    return [partial, 4 * grid]
