"""Functions that PyTorch takes apart for fake tensors otherwise than for those of CUDA."""

import torch

from simgpu.device import on_card

_ATEN = torch.ops.aten


def rms_norm(rig, original, input, normalized_shape, weight=None, eps=None):
    """CUDA has one kernel for it; on other devices torch takes it apart."""
    if not on_card(input):
        return original(input, normalized_shape, weight, eps)
    return _ATEN._fused_rms_norm(input, normalized_shape, weight, eps)[0]


def linear(rig, original, input, weight, bias=None):
    """Behind an input that does not lie in one piece the bias is added in place, but for fake
    tensors (aten/src/ATen/native/Linear.cpp)."""
    if bias is None or not on_card(input) or input.ndim == 2 or input.is_contiguous():
        return original(input, weight, bias)
    return torch.matmul(input, weight.t()).add_(bias)
