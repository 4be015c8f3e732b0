"""Shape rules of single operators that differ from PyTorch's, or need not be asked each time."""

from collections.abc import Iterable

import torch
from torch._subclasses.fake_tensor import FakeTensor

from simgpu.convolution import backward

_ATEN = torch.ops.aten
# Operators that make no storage, and the commonest of those that make one new tensor. torch's
# general path for fake tensors takes several times as long for them as their shape rule, or as
# looking up what the rule has said before.
VIEWS = {
    getattr(_ATEN, name).default
    for name in ("alias", "detach", "expand", "permute", "t", "unsqueeze", "view", "_unsafe_view")
}
VIEWS |= {_ATEN.select.int, _ATEN.slice.Tensor, _ATEN.transpose.int}
PLAIN = {
    getattr(_ATEN, name).default
    for name in ("addmm", "bmm", "cat", "clone", "gelu", "mm", "neg", "rsqrt", "sigmoid", "silu")
}
PLAIN |= {_ATEN.add.Tensor, _ATEN.mul.Tensor, _ATEN.sub.Tensor, _ATEN.mean.dim}
PLAIN |= {_ATEN.pow.Tensor_Scalar, _ATEN.silu_backward.default, _ATEN._softmax.default}


def _safe_softmax(scores: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    # Besides the result one byte per score, to look for rows that are masked as a whole; torch's
    # shape rule would make the result twice, which the CUDA kernel does not.
    output = torch.softmax(scores, dim, dtype=dtype)
    scores.eq(float("-inf")).all(dim, keepdim=True)
    return output


def _convolution_backward(gradient, *others):
    return NotImplemented if gradient.device.type == "cpu" else backward(gradient, *others)


def _fused_rms_norm(input, normalized_shape, weight, eps):
    rows = input.shape[: input.ndim - len(normalized_shape)]
    reciprocals = (*rows, *[1] * len(normalized_shape))
    return torch.empty_like(input), input.new_empty(reciprocals, dtype=torch.float32)


def _fused_rms_norm_backward(gradient, input, normalized_shape, rstd, weight, mask):
    wanted = (input, weight)
    return tuple(
        torch.empty_like(each) if of else None for each, of in zip(wanted, mask, strict=True)
    )


# Operators that allocate otherwise than their shape rule; NotImplemented leaves a call to it.
REWRITTEN = {
    _ATEN._safe_softmax.default: _safe_softmax,
    _ATEN.convolution_backward.default: _convolution_backward,
    _ATEN._fused_rms_norm.default: _fused_rms_norm,
    _ATEN._fused_rms_norm_backward.default: _fused_rms_norm_backward,
}


def common_card(args: tuple) -> torch.device | None:
    """The card that all tensors of an operator are on; None where it is not one alone."""
    found = None
    for each in args[0] if isinstance(args[0], list | tuple) else args:
        if isinstance(each, FakeTensor) and each.constant is None:
            device = each.fake_device
            if device.type in ("cpu", "meta") or (found is not None and found != device):
                return None
            found = device
        elif isinstance(each, torch.Tensor):
            return None
    return found


def described(args: Iterable) -> tuple:
    """Arguments as a shape rule sees them."""
    return tuple(
        (each.shape, each.stride(), each.dtype)
        if isinstance(each, torch.Tensor)
        else described(each)
        if isinstance(each, list | tuple)
        else (type(each), each)
        for each in args
    )
