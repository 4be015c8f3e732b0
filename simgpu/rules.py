"""Shape rules of single operators that differ from PyTorch's, or need not be asked each time."""

from collections.abc import Iterable
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree

from simgpu.convolution import backward
from simgpu.units import MIB

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
PLAIN |= {
    _ATEN.stack.default,
    _ATEN.pow.Tensor_Scalar,
    _ATEN.silu_backward.default,
    _ATEN._softmax.default,
}
TO_COPY = _ATEN._to_copy.default


def _safe_softmax(scores: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    # Besides the result one byte per score, to look for rows that are masked as a whole; torch's
    # shape rule would make the result twice, which the CUDA kernel does not.
    output = torch.softmax(scores, dim, dtype=dtype)
    scores.eq(float("-inf")).all(dim, keepdim=True)
    return output


def _softmax(operator, scores: torch.Tensor, dim: int, dtype: torch.dtype | None = None):
    # On CUDA one kernel reads float16 and writes float32 (aten/src/ATen/native/SoftMax.cpp); others
    # convert first.
    at_once = scores.dtype is torch.float16 and dtype is torch.float32
    return operator(scores if at_once or dtype is None else scores.to(dtype), dim, at_once)


# By the name of an operator that PyTorch takes apart, what it is taken apart into.
SOFTMAX = {
    "softmax.int": partial(_softmax, _ATEN._softmax.default),
    "log_softmax.int": partial(_softmax, _ATEN._log_softmax.default),
}


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


def _gru_cell(input_gates, hidden_gates, state, input_bias=None, hidden_bias=None):
    """A step of ``GRUCell``, which has no shape rule (aten/src/ATen/native/cuda/RNN.cu)."""
    workspace = state.new_empty((state.shape[0], _GRU_WORKSPACE * state.shape[1]))
    return torch.empty_like(state), workspace


def _gru_cell_backward(gradient, workspace, has_bias):
    gates = 3 * workspace.shape[1] // _GRU_WORKSPACE
    of_input, of_hidden = (workspace.new_empty((workspace.shape[0], gates)) for _ in range(2))
    biases = [each.sum(0) if has_bias else None for each in (of_input, of_hidden)]
    return of_input, of_hidden, torch.empty_like(gradient), *biases


def _grouped_product(left, right, offs=None, bias=None, out_dtype=None):
    """Products of experts' tokens, whose rows begin at multiples of 16 bytes on CUDA, in any type
    (GroupedMMUtils.h; torch's shape rule pads on builds for CUDA only, and takes bfloat16 only)."""
    if bias is not None or (offs is None) is (left.ndim == 2 or right.ndim == 2):
        return NotImplemented  # which says what is wrong
    groups = [len(each) for each in (left, right) if each.ndim == 3]
    if len({*groups, *([] if offs is None else [len(offs)])}) > 1:
        return NotImplemented
    rows, columns, dtype = left.shape[-2], right.shape[-1], out_dtype or left.dtype
    in_row = 16 // dtype.itemsize
    padded = -(-columns // in_row) * in_row
    if left.ndim != right.ndim:
        return left.new_empty((rows, padded), dtype=dtype)[:, :columns]
    count = groups[0] if groups else len(offs)
    return left.new_empty((count, rows, padded), dtype=dtype)[..., :columns]


_GRU_WORKSPACE = 5
# Operators that allocate otherwise than their shape rule; NotImplemented leaves a call to it.
REWRITTEN = {
    _ATEN._safe_softmax.default: _safe_softmax,
    _ATEN.convolution_backward.default: _convolution_backward,
    # Where PyTorch leaves them whole, as in torch.inference_mode().
    _ATEN.softmax.int: SOFTMAX["softmax.int"],
    _ATEN.log_softmax.int: SOFTMAX["log_softmax.int"],
    _ATEN._fused_rms_norm.default: _fused_rms_norm,
    _ATEN._fused_rms_norm_backward.default: _fused_rms_norm_backward,
    _ATEN._grouped_mm.default: _grouped_product,
    _ATEN._thnn_fused_gru_cell.default: _gru_cell,
    _ATEN._thnn_fused_gru_cell_backward.default: _gru_cell_backward,
}


NOT_DENSE = (
    "Sparse, quantized and nested tensors are not simulated: their shape does not tell their bytes."
    " Use a dense tensor (sparse=False for an embedding, layout=torch.jagged for a nested one), or"
    " run this on a real device."
)


def refuse_compiled(func):
    raise RuntimeError(
        f"{func} is not simulated: PyTorch means it to be compiled. Use what it stands for, as"
        " functional.scaled_dot_product_attention, or run this on a real device."
    )


# Most bytes of the arguments of an operator without a shape rule.
_MOST_EXAMPLE_BYTES = 64 * MIB


def by_example(mode, func, args: tuple, kwargs: dict):
    """The result of an operator for which PyTorch has no shape rule: what the CPU makes of zeros.

    Raises:
        RuntimeError: there is no such operator on the CPU, or it would take too long.
    """
    examples: dict[int, torch.Tensor] = {}  # by id of what they stand for

    def example(each):
        if isinstance(each, FakeTensor):
            if id(each) not in examples:
                zeros = torch.empty_strided(each.shape, each.stride(), dtype=each.dtype).zero_()
                examples[id(each)] = zeros
            return examples[id(each)]
        return torch.device("cpu") if isinstance(each, torch.device) else each

    given = [each for each in _pytree.tree_leaves((args, kwargs)) if isinstance(each, FakeTensor)]
    devices = [each.fake_device for each in given]
    cards = [device for device in devices if device.type != "cpu"] or devices
    is_small = sum(each.nbytes for each in given) <= _MOST_EXAMPLE_BYTES
    tags = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
    problem = None
    if is_small and cards and not tags & set(func.tags):
        try:
            with torch.no_grad():
                args, kwargs = _pytree.tree_map(example, (args, kwargs))
                output = func(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            problem = error
        else:
            stood_for = {id(examples[id(each)]): each for each in given}

            def card(each):
                if not isinstance(each, torch.Tensor) or id(each) in stood_for:
                    return stood_for.get(id(each), each)
                if each.layout is not torch.strided or each.is_quantized:
                    raise RuntimeError(NOT_DENSE)
                options = {"dtype": each.dtype, "device": "meta"}
                made = torch.empty_strided(each.shape, each.stride(), **options)
                return FakeTensor(mode, made, cards[0])

            return _pytree.tree_map(card, output)
    raise RuntimeError(
        f"{func} is not simulated: PyTorch has no shape rule for it. Leave it out, give it one"
        " (torch.library.register_fake) if it is your own, or run this on a real device."
    ) from problem


# Operators whose matrices must have one type; their shape rules do not ask for it.
PRODUCTS = {getattr(_ATEN, name).default for name in ("mm", "addmm", "bmm", "baddbmm", "mv", "dot")}


def check_product(args: tuple):
    """Raise RuntimeError where matrices have different types, as CUDA's kernels do."""
    first, second = [each.dtype for each in args if isinstance(each, torch.Tensor)][-2:]
    if first != second:
        raise RuntimeError(
            f"expected mat1 and mat2 to have the same dtype, but got: {first} != {second}"
        )


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


def copied_to(args: tuple, kwargs: dict) -> torch.device | None:
    """Where a copy of a fake tensor goes; None where PyTorch's own rule has to say it."""
    source, device = args[0], kwargs.get("device")
    if not isinstance(source, FakeTensor) or source.constant is not None or "pin_memory" in kwargs:
        return None
    device = source.fake_device if device is None else device
    is_known = device.type == "cpu" or device.index is not None
    return device if is_known and device.type != "meta" else None


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
