"""What sorting, and what is built on it, takes on CUDA besides its results.

Which kernel runs is PyTorch's choice: aten/src/ATen/native/cuda/Sort.cpp, SortStable.cu,
TensorTopK.cu, MultinomialKernel.cu, EmbeddingBackwardKernel.cu, Indexing.cu, Randperm.cu and
Unique.cu. They hand most of the work to CUB, whose temporary storage is laid out in its
dispatch_radix_sort.cuh; how many numbers a block sorts or adds at a time is of its tuning for
Hopper and was read off traces (H100, torch 2.11, 2026-11-27). Other cards have other blocks, which
is less than 1 % of what sorting takes.

Sizes are bytes in the order in which they are taken; a list among them is taken together and given
back before what follows.
"""

import math

import torch

from simgpu.catalog import Card
from simgpu.reductions import partial_results

_DIGITS, _ALIGNED, _PLACE = 256, 256, 8  # values of a digit; CUB's alignment; bytes of an index
# Numbers a block sorts, by bytes of key and value.
_TILES = {(8, 8): 4608, (4, 8): 5376, (2, 8): 5632, (1, 8): 3456, (8, 0): 5760}
_SMALL_SORT = 4096  # longest row that is sorted in place (should_use_small_sort in Sort.h)
_MANY_ROWS, _LONG_ROW = 128, 10**6
# CUB's sums by key of the counts of blocks: the same in every trace, of up to 832 blocks.
_RUNNING_BYTES = 1279
_FEW_INDICES = 3072  # of an embedding whose gradients are added without sorting


class Early(list):
    """Sizes of what is taken before an operator's results."""


def _aligned(*sizes: int) -> int:
    return sum(-(-size // _ALIGNED) * _ALIGNED for size in sizes) + _ALIGNED - 1


def radix_sort(count: int, key: int, value: int = 0, bits: int | None = None) -> int:
    """CUB's temporary storage to sort so many keys of so many bytes, by their lowest bits."""
    widest = max(key, value)
    if count <= 256 * (19 * 4 // widest):
        return 1  # one block does it
    passes = math.ceil((bits or 8 * key) / 8)
    blocks = math.ceil(count / _TILES.get((key, value), 23040 // widest))
    copies = (count * key, count * value) if passes > 1 else ()
    return _aligned(passes * _DIGITS * 8, blocks * _DIGITS * 4, passes * 4, *copies)


def scan(count: int, size: int) -> int:
    """CUB's temporary storage for running sums of so many numbers of so many bytes."""
    per_block, state = {2: (3776, 8), 8: (1120, 20)}.get(size, (1920, 8))
    return _aligned((math.ceil(count / per_block) + 32) * state, 0 if size == 8 else 1)


def sort_scratch(tensor: torch.Tensor, dim: int) -> list:
    """Of ``sort`` along one dimension."""
    if not tensor.ndim or not tensor.numel():
        return []
    rows, length, key = tensor.numel() // tensor.shape[dim], tensor.shape[dim], tensor.itemsize
    if length <= _SMALL_SORT:
        return [[length * _PLACE]]  # the indices of one row, until they are copied to all
    count, taken = tensor.numel(), []
    if tensor.stride(dim) != 1:
        # It is sorted as rows, from where values and indices are copied to the results.
        taken = [count * key, count * key, count * _PLACE]
    if rows == 1 or length >= _LONG_ROW:
        return [*taken, length * _PLACE, *[[radix_sort(length, key, _PLACE)]] * rows]
    if rows >= _MANY_ROWS:
        return [*taken, count * _PLACE, _aligned(count * key, count * _PLACE)]
    pairs = [count * key, radix_sort(count, key, _PLACE)]
    by_row = radix_sort(count, 8, bits=max(1, math.ceil(math.log2(rows))))
    return [*taken, count * _PLACE, count * _PLACE, pairs, [by_row]]


def topk_scratch(tensor: torch.Tensor, k: int, dim: int, is_sorted: bool, card: Card) -> list:
    """Of ``topk``; long rows are divided among blocks (``mbtopk``)."""
    if not tensor.ndim or not tensor.numel():
        return []
    length = tensor.shape[dim]
    rows, taken = tensor.numel() // length, []
    longest_undivided = ((20, 20000), (40, 10000), (80, 8000), (200, 5000), (800, 3000))
    longest_undivided += ((4000, 800), (math.inf, 400))
    if length >= next(least for most, least in longest_undivided if rows <= most):
        at_a_time = card.multiprocessors * 6 * 256  # six blocks of 256 threads fit a multiprocessor
        each = min(64, max(4, math.ceil(length * rows / at_a_time)))
        blocks = rows * math.ceil(length / (256 * each))
        counts = [blocks * _DIGITS * 2, rows * _DIGITS * 4, blocks * 4, blocks * 4]
        running = [_RUNNING_BYTES]
        taken.append([rows * tensor.itemsize, *[rows * _PLACE] * 2, *counts, running, running])
    if is_sorted and k > _SMALL_SORT:
        found = torch.empty(rows, k, dtype=tensor.dtype, device="meta")
        taken += [rows * k * _PLACE, rows * k * tensor.itemsize, *sort_scratch(found, 1)]
    return taken


def multinomial_scratch(tensor: torch.Tensor, samples: int, replaced: bool, card: Card) -> list:
    """Of ``multinomial``: scores divided by random numbers, of which the largest are drawn; or the
    probabilities, their running sums and a copy."""
    if replaced and samples > 1:
        return [tensor.nbytes] * 3
    if samples > 1:
        drawn = topk_scratch(tensor, samples, tensor.ndim - 1, True, card)
        rows = tensor.numel() // tensor.shape[-1]
        return [tensor.nbytes, rows * samples * tensor.itemsize, *drawn]
    layout = (tensor.shape, tensor.stride(), 0)
    return [tensor.nbytes, partial_results(layout, [tensor.ndim - 1], 16, card)]


def embedding_scratch(indices: torch.Tensor, width: int, rows: int, by_frequency: bool) -> list:
    """Of an embedding's gradient: indices are sorted and gradients added in pieces of ten."""
    count = indices.numel()
    if count <= _FEW_INDICES and not by_frequency:
        return []
    place, runs = count * _PLACE, min(count, rows) * _PLACE
    pieces = count // 10 + min(count, rows)
    at_once = [Early([place, place, [place, radix_sort(count, 8, 8)]])]
    if by_frequency:
        at_once += [place, [scan(count, 4)], [scan(count, 4)]]
    at_once += [place, 8, [place, scan(count, 4)], runs, runs, [scan(count, 4)], 8]
    return [*at_once, pieces * _PLACE, pieces * width * 4]


def indexed_add_scratch(indices, target: torch.Tensor, values=None, moved=()) -> list:
    """Of values added to places of ``target`` that may be named twice: the places are sorted.

    ``values`` that do not lie there one by one are copied; ``moved`` are sizes of indices that
    come from the host, of which the places are computed (``index_put_with_sort_kernel``).
    """
    known = [index for index in indices if index is not None]
    count = math.prod(torch.broadcast_shapes(*(index.shape for index in known)))
    dims = [dim for dim, index in enumerate(indices) if index is not None]
    places = math.prod(target.shape[dim] for dim in dims)
    bits, place = max(1, math.ceil(math.log2(max(2, places)))), count * _PLACE
    # The sum, and with several dimensions each one's part of it.
    taken = [[*moved, *[place] * (3 if len(known) > 1 else 2)]]
    whole = count * (target.numel() // places) * target.itemsize
    if values is not None and (values.nbytes != whole or not values.is_contiguous()):
        taken.append(whole)
    return [*taken, place, place, place, [place, radix_sort(count, 8, 8, bits)]]


def permutation_scratch(count: int) -> list:
    """Of ``randperm``: numbers sorted by random keys long enough to be distinct."""
    bits = min(64, math.ceil(math.log2(count - (6 * count**2 + 1) / (12 * math.log(0.9)))))
    key = 4 if bits <= 32 else 8
    return [[8], count * _PLACE, count * key, count * key, radix_sort(count, key, 8, bits)]


def unique_scratch(tensor: torch.Tensor, counted: bool) -> list:
    """Of ``unique``: a sorted copy, and with counts or inverse also where each number came from."""
    count, size = tensor.numel(), tensor.itemsize
    if not counted:
        return [count * size, [radix_sort(count, size)], 8, [scan(count, 4)]]
    place = count * _PLACE
    places = [place, place, [radix_sort(count, size, 8)]]
    return [count * size, places, place, place, 8, place, [scan(count, 8)]]
