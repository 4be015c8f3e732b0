"""What convolutions take besides their results: cuDNN's workspaces, and copies in its layout.

PyTorch leaves the choice of a kernel to cuDNN (aten/src/ATen/native/cudnn/Conv_v8.cpp), which does
not publish how it chooses nor what the kernels need. So this is not derived: 160 convolutions were
traced on an H100 (torch 2.11, cuDNN 9.19, 2026-11-27), and what they have in common is charged.

- Kernels work with channels side by side. Where channels come first, cuDNN copies what goes in and
  out. A 1 x 1 kernel of stride 1 needs no copies, nor does a tensor of one position or channel.
- Few channels are filled up to eight, in half precision.
- A weight's gradient is summed in parts, each a weight in float32, as many as keep the card busy.

So most calls count as unmodelled, at most as large as ``bound_bytes`` says.
"""

import math

import torch

from simgpu.sorting import Early
from simgpu.units import MIB

_MULTIPROCESSORS, _TILE = 132, 128
# Half precision: a kernel of its own for few channels of large pictures, which fills none up. From
# 448 x 448 pixels to 1120 x 1120 it was traced, up to 384 x 384 another.
_LARGE_PICTURE = 448 * 448
_PARTS_MOST = 16 * MIB
_DIRECT = range(32, 65)
_FEW_CHANNELS, _PARTS_OF_FEW, _LONG_SUM, _PARTS_BYTES = 8, 14, 3000, 12 * MIB


def is_channels_last(*tensors: torch.Tensor) -> bool:
    """Whether cuDNN is given channels side by side: where one of the tensors has them so, also one
    with gaps (``is_channels_last_strides_2d`` in c10/core/MemoryFormat.h)."""
    return any(map(_has_channels_last, tensors))


def _has_channels_last(tensor: torch.Tensor) -> bool:
    if tensor.ndim != 4 or not tensor.stride(1):
        return False
    least = 0
    for dim in (1, 3, 2, 0):
        size, stride = tensor.shape[dim], tensor.stride(dim)
        if not size or stride < least or (dim == 0 and least == tensor.stride(1)):
            return False
        least = stride * size if size > 1 else stride
    return True


def _positions(tensor: torch.Tensor) -> int:
    return math.prod(tensor.shape[2:])


def _is_product(weight: torch.Tensor, stride) -> bool:
    return _positions(weight) == 1 and set(stride) == {1}


def _is_depthwise(input: torch.Tensor, groups: int) -> bool:
    """PyTorch has kernels of its own for these, which take nothing."""
    return groups == input.shape[1] and groups > 1


def _moved(tensor: torch.Tensor, filled: bool) -> int:
    """Bytes of a tensor's copy with channels side by side, filled up to eight if ``filled``."""
    channels = tensor.shape[1]
    if filled and channels < _FEW_CHANNELS:
        return tensor.nbytes // channels * _FEW_CHANNELS
    return 0 if channels == 1 or _positions(tensor) == 1 else tensor.nbytes


def _data_bytes(input, weight, output, stride, groups: int, forward: bool = False) -> int:
    """The workspace of a convolution, or of the gradient of its input."""
    if _is_depthwise(input, groups):
        return 0
    half, few = input.element_size() == 2, input.shape[1] < _FEW_CHANNELS
    if is_channels_last(input, weight):
        in_pieces = forward and not half and tuple(weight.shape[2:]) == tuple(stride) != (1, 1)
        return _moved(input, half) + _moved(weight, half) + 16 if few or in_pieces else 0
    if _is_product(weight, stride):
        return _moved(input, False) + _moved(output, False) if _positions(input) % 2 else 0
    if half and _positions(output) == 1:
        return 0  # a product of whole inputs and weights
    if few and max(weight.shape[2:]) <= 3:
        return 0
    filled = half and few
    if filled and _positions(input) >= _LARGE_PICTURE:
        if input.dtype is torch.bfloat16:
            return 0
        filled = False
    # In float32 a kernel that puts its result where it belongs, for 32 to 64 channels.
    moved = _moved(output, False)
    if forward and not half and input.shape[1] in _DIRECT:
        moved = 0
    return _moved(input, filled) + _moved(weight, filled) + moved + 16


def _weight_bytes(gradient, input, weight, stride, groups: int) -> int:
    """The workspace of the gradient of a weight."""
    half, few = input.element_size() == 2, input.shape[1] < _FEW_CHANNELS
    if _is_depthwise(input, groups) or (few and not half and max(weight.shape[2:]) <= 3):
        return 0
    part, is_product = weight.numel() * 4, _is_product(weight, stride)
    tiles = -(-weight.shape[0] // _TILE) * -(-weight.shape[1] // _TILE) * _positions(weight)
    parts = _MULTIPROCESSORS // (2 * tiles if half else tiles)
    if is_channels_last(input, weight):
        parts *= 2 if is_product and not half else 1
        return parts * part if parts > 1 else 0
    copies = _moved(gradient, False) + _moved(input, half and few)
    if is_product and _positions(input) % 2:
        return copies
    if is_product:  # a part of each picture, while these are no more than the copies would be
        return min(input.shape[0] * part, copies)
    copies += _moved(weight, half and few)
    if few:
        if len(gradient) * _positions(gradient) < _LONG_SUM:
            return copies
        filled = part // weight.shape[1] * _FEW_CHANNELS
        return copies + (_PARTS_OF_FEW * filled if half else _PARTS_BYTES)
    return copies + (parts * part if parts > 2 else 0)


def bound_bytes(a: dict, output: torch.Tensor) -> int:
    """The most that a convolution takes, as far as traces go; 0 where all traces of its kind show
    what is charged: PyTorch's own kernels, and in half precision the patches of pictures, or of
    features that lie side by side (GLM-4V's tower, in every stored run)."""
    input, weight = a["input"], a["weight"]
    are_patches = input.element_size() == 2 and tuple(weight.shape[2:]) == tuple(a["stride"])
    are_patches &= input.shape[1] <= 4 or is_channels_last(input, weight)
    if are_patches or _is_depthwise(input, a["groups"]):
        return 0
    return input.nbytes + weight.nbytes + output.nbytes + _PARTS_MOST


def _layout(input, weight) -> torch.memory_format:
    return torch.channels_last if is_channels_last(input, weight) else torch.contiguous_format


def _copied(tensor: torch.Tensor, layout: torch.memory_format) -> list[int]:
    return [] if tensor.is_contiguous(memory_format=layout) else [tensor.nbytes]


def forward_scratch(a: dict, results: list, card) -> list:
    """Of ``aten::convolution``: copies in cuDNN's layout, and its workspace."""
    input, weight = a["input"], a["weight"]
    layout = _layout(input, weight)
    size = _data_bytes(input, weight, results[0], a["stride"], a["groups"], True)
    return [Early(_copied(input, layout)), *_copied(weight, layout), *([size] if size else [])]


def backward(gradient, input, weight, bias_sizes, *settings) -> tuple:
    """``aten::convolution_backward`` as cuDNN does it, one gradient after the other; what the
    weight's needs of the input is copied before the first (aten/src/ATen/native/Convolution.cpp).
    """
    stride, *_, groups, (of_input, of_weight, of_bias) = settings
    layout = _layout(input, weight)
    gradients = [None, None, None]

    def scratch(size: int):
        if size:
            torch.empty(size, dtype=torch.uint8, device=gradient.device)  # gone at once

    moved_input = input.contiguous(memory_format=layout) if of_weight else input
    laid_out = gradient.contiguous(memory_format=layout)
    if of_input:
        gradients[0] = torch.empty_like(input, memory_format=layout)
        moved = weight.contiguous(memory_format=layout)
        scratch(_data_bytes(input, weight, gradient, stride, groups))
        del moved
    if of_weight:
        gradients[1] = torch.empty_like(weight, memory_format=layout)
        scratch(_weight_bytes(gradient, input, weight, stride, groups))
    del laid_out, moved_input
    if of_bias:
        gradients[2] = gradient.sum([0, *range(2, gradient.ndim)])
    return tuple(gradients)


def strides(args: tuple, output: torch.Tensor) -> tuple | None:
    """Of a convolution's result, where they are not those of a contiguous tensor."""
    if output.ndim != 4 or not is_channels_last(*args[:2]):
        return None
    return torch.empty(output.shape, device="meta", memory_format=torch.channels_last).stride()
