"""Which operators take memory on CUDA besides their results, and of which that is not known.

An operator has a rule here, or is known to take none (elementwise operators, views, and those of
``_TAKE_NONE``, looked up in PyTorch's sources or traced), or counts as unmodelled. Traces are of an
H100 with torch 2.11, cuDNN 9.19 and CUDA 13.0, 2026-11-27.

Sizes are bytes in the order in which they are taken, and are given back when the operator ends; a
list among them is taken together and given back before what follows; what is ``Early`` is taken
before the results.
"""

import functools
import math
from collections.abc import Callable, Iterable

import torch

from simgpu import attention_scratch, convolution, linalg, sorting
from simgpu.catalog import Card
from simgpu.reductions import REDUCTIONS, reduction_scratch
from simgpu.units import as_pytorch_writes

Early = sorting.Early
Rule = Callable[[dict, list, Card], Iterable]  # arguments by name, results, card


class Unmodelled(dict[str, int | None]):
    """Operators that may have taken memory nobody knows of, and how many bytes the largest call of
    each took at most; None where no bound is known."""

    def note(self, name: str, bound_bytes: int | None):
        """A call that took at most so much."""
        sizes = (self.get(name, 0), bound_bytes)
        self[name] = None if None in sizes else max(sizes)

    def __str__(self):
        """ "exact", or "not exact: ..." with the operators and the largest bound."""
        if not self:
            return "exact"
        most = "with no known bound"
        if None not in self.values():
            most = f"at most {as_pytorch_writes(max(self.values()))} each"
        kind = "operator" if len(self) == 1 else "operators"
        return f"not exact: {len(self)} {kind} unmodelled, {most} ({', '.join(sorted(self))})"


def scratch(operator, args: tuple, kwargs: dict, results: list, card: Card) -> list | None:
    """What an operator takes besides ``results``; None where that is not known."""
    rule, takes_none = _rule_of(operator)
    if rule is None:
        return [] if takes_none else None
    return list(rule(_by_name(operator, args, kwargs), results, card))


def early_and_late(sizes: list) -> tuple[list, list]:
    """What is taken before the results, and what after them."""
    early = [size for part in sizes if isinstance(part, Early) for size in part]
    return early, [part for part in sizes if not isinstance(part, Early)]


def bound_bytes(operator, args: tuple, kwargs: dict, results: list) -> int | None:
    """The most that an unmodelled operator takes, where there is a bound; 0 if it is exact."""
    if _name(operator) == "convolution":
        return convolution.bound_bytes(_by_name(operator, args, kwargs), results[0])
    if _name(operator) in linalg.BOUNDED | _BOUNDED:
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
        return 3 * max((each.nbytes for each in (*tensors, *results)), default=0) + 2**23
    return None


@functools.cache
def _rule_of(operator) -> tuple[Rule | None, bool]:
    name = _name(operator)
    if name in _RULES:
        return _RULES[name], True
    if name in REDUCTIONS and torch.Tag.pointwise not in operator.tags:
        return functools.partial(_reduction, name), True
    return None, _takes_none(operator, name)


def _takes_none(operator, name: str) -> bool:
    schema = operator._schema
    views = [each.alias_info for each in schema.returns]
    is_view = bool(views) and all(each is not None and not each.is_write for each in views)
    name = name.removesuffix("_")
    return (
        is_view
        or torch.Tag.pointwise in operator.tags
        or name in _TAKE_NONE
        or name.startswith(_FAMILIES)
    )


def _name(operator) -> str:
    return operator._schema.name.removeprefix("aten::")


def _by_name(operator, args: tuple, kwargs: dict) -> dict:
    arguments = operator._schema.arguments
    values = {each.name: each.default_value for each in arguments if each.has_default_value()}
    return values | dict(zip((each.name for each in arguments), args, strict=False)) | kwargs


def _reduction(name: str, a: dict, results: list, card: Card) -> list[int]:
    if "other" in a:  # of two tensors: elementwise
        return []
    return reduction_scratch(name, a, results, card)


def _product(*names: str):
    """Copies of factors whose rows and columns cuBLAS cannot take as they lie, such as an expanded
    gradient (``prepare_matrix_for_cublas`` in cuda/cuBlasCommonArgs.h)."""

    def rule(a, results, card):
        return [a[name].nbytes for name in names if not _suits_cublas(a[name])]

    return rule


def _suits_cublas(matrix: torch.Tensor) -> bool:
    rows, columns = matrix.shape[-2:]
    by_row, by_column = matrix.stride()[-2:]
    return (
        (by_column == 1 and by_row >= max(1, columns))
        or (by_row == 1 and by_column >= max(1, rows))
        or matrix.is_contiguous()
    )


def _along(dim: int, tensor: torch.Tensor) -> int:
    return dim % max(1, tensor.ndim)


def _running(a, results, card):
    """Running sums of one row; those of many rows need no memory (ScanKernels.cpp)."""
    tensor, (result, *_) = a["self"], results
    copied = [] if tensor.dtype == result.dtype else [result.nbytes]
    is_row = tensor.numel() == tensor.shape[_along(a["dim"], tensor)] if tensor.ndim else False
    return [*copied, sorting.scan(tensor.numel(), result.itemsize)] if is_row else copied


def _log_sum_exp(a, results, card):
    """The largest, which of them are infinite, and all numbers' exponentials (ReduceOps.cpp)."""
    (result,) = results
    largest = reduction_scratch("amax", a, results, card)
    sums = reduction_scratch("sum", a, results, card)
    return [result.nbytes, [*largest], [result.nbytes, result.numel()], [a["self"].nbytes, sums]]


def _count_nonzero(a, results, card):
    tensor = a["self"]
    as_numbers = {"self": tensor.to(torch.int64), "dim": a.get("dim")}
    taken = reduction_scratch("sum", as_numbers, results, card)
    return [tensor.numel(), 8 * tensor.numel(), *taken]


def _extremes(a, results, card):
    """The smallest and the largest number, one after the other."""
    tensor = {"self": a["self"]}
    one = [a["self"].itemsize, *reduction_scratch("amax", tensor, [a["self"]], card)]
    return [one, one]


def _rows(a, results, card):
    """Indices that do not lie side by side are copied (Embedding.cpp: ``reshape``)."""
    indices = a["indices"]
    return [] if indices.is_contiguous() else [Early([indices.numel() * indices.itemsize])]


def _from_host(indices, like: torch.Tensor) -> Early:
    """Indices on the host are copied to the tensor's card, masks as the places they choose."""
    masks = (torch.bool, torch.uint8)
    return Early(
        int(each.count_nonzero()) * each.ndim * 8 if each.dtype in masks else each.numel() * 8
        for each in indices
        if each is not None and each.device != like.device
    )


def _indexed(a, results, card):
    """Two or more indices whose strides differ once they have one shape are copied
    (``make_info`` in TensorAdvancedIndexing.cpp)."""
    indices = [each for each in a["indices"] if each is not None]
    if moved := _from_host(indices, a["self"]):
        return [moved]
    if any(each.dtype in (torch.bool, torch.uint8) for each in indices):
        return []
    shape = torch.broadcast_shapes(*(each.shape for each in indices))
    strides = {each.expand(shape).stride() for each in indices}
    if len(strides) < 2:
        return []
    return [Early([math.prod(shape) * each.itemsize for each in indices])]


def _indexed_put(a, results, card):
    moved = _from_host(a["indices"], a["self"])
    on_card = [
        each for each in a["indices"] if each is not None and each.device == a["self"].device
    ]
    if not a["accumulate"] or any(each.dtype in (torch.bool, torch.uint8) for each in on_card):
        return [moved]
    return sorting.indexed_add_scratch(a["indices"], a["self"], a["values"], moved)


def _reduced_at_places(a, results, card):
    """With a mean the numbers of each place are counted and the sums divided by them."""
    nbytes = a["self"].nbytes
    return [[nbytes, nbytes], nbytes, nbytes // 4] if a.get("reduce") == "mean" else []


def _made_contiguous(*names: str):
    """Copies of tensors that a kernel wants in order (``expect_contiguous``)."""

    def rule(a, results, card):
        return [a[name].nbytes for name in names if not a[name].is_contiguous()]

    return rule


def _group_norm(a, results, card):
    """A scale and a shift for each channel of each picture."""
    return [4 * a["N"] * a["C"]] * 2


def _group_norm_backward(a, results, card):
    channels, groups = 4 * a["N"] * a["C"], 4 * a["N"] * a["group"]
    return [channels, channels, groups, groups, channels]


def _encoder_layer(a, results, card):
    """Attention, then the wide layer and its norms (transformer_encoder_layer_forward)."""
    one = results[0].nbytes
    wide = one // results[0].shape[-1] * a["ffn_weight_1"].shape[0]
    return [[3 * one, one, one], one, wide]


def _native_norm(per_number: int):
    """cuDNN's workspace with channels side by side, in float32: a bit and more for each number."""

    def rule(a, results, card):
        tensor = a["input"]
        last = tensor.dtype is torch.float32 and convolution.is_channels_last(tensor)
        return [tensor.numel() // per_number] if last else []

    return rule


def _bag_backward(a, results, card):
    if a["mode"] == 2:
        return []
    width = results[0].shape[1]
    freq = a["scale_grad_by_freq"]
    return sorting.embedding_scratch(a["indices"], width, a["num_weights"], freq)


_RULES: dict[str, Rule] = {
    "sort": lambda a, r, card: sorting.sort_scratch(a["self"], _along(a["dim"], a["self"])),
    "topk": lambda a, r, card: sorting.topk_scratch(
        a["self"], a["k"], _along(a["dim"], a["self"]), a["sorted"], card
    ),
    "multinomial": lambda a, r, card: sorting.multinomial_scratch(
        a["self"], a["num_samples"], a["replacement"], card
    ),
    "randperm": lambda a, r, card: sorting.permutation_scratch(a["n"]) if a["n"] > 1 else [],
    "_unique2": lambda a, r, card: sorting.unique_scratch(
        a["self"], a["return_counts"] or a["return_inverse"]
    ),
    "embedding_dense_backward": lambda a, r, card: sorting.embedding_scratch(
        a["indices"], a["grad_output"].shape[-1], a["num_weights"], a["scale_grad_by_freq"]
    ),
    "_embedding_bag_dense_backward": _bag_backward,
    "mm": _product("self", "mat2"),
    "bmm": _product("self", "mat2"),
    "addmm": _product("mat1", "mat2"),
    "baddbmm": _product("batch1", "batch2"),
    "cumsum": _running,
    "cumprod": _running,
    "logcumsumexp": _running,
    "_logcumsumexp": _running,
    "logsumexp": _log_sum_exp,
    "count_nonzero": _count_nonzero,
    "masked_scatter": lambda a, r, card: [
        8 * a["mask"].numel(),
        sorting.scan(a["mask"].numel(), 8),
    ],
    "embedding": _rows,
    "index": _indexed,
    "index_put": _indexed_put,
    "index_put_": _indexed_put,
    "_index_put_impl_": _indexed_put,
    "scatter_reduce": _reduced_at_places,
    "scatter_reduce_": _reduced_at_places,
    "index_reduce": _reduced_at_places,
    "index_reduce_": _reduced_at_places,
    "native_layer_norm": _made_contiguous("input"),
    "native_layer_norm_backward": _made_contiguous("grad_out", "input"),
    "native_group_norm": _group_norm,
    "native_group_norm_backward": _group_norm_backward,
    # The product of gradient and result (SoftMax.cu); of the logarithm there is none.
    "_softmax_backward_data": lambda a, r, card: [a["grad_output"].nbytes],
    "histc": _extremes,
    "bincount": _extremes,
    "dist": lambda a, r, card: [a["self"].nbytes, *reduction_scratch("norm", a, r, card)],
    "im2col": lambda a, r, card: [a["self"].nbytes],
    "_native_multi_head_attention": lambda a, r, card: [3 * r[0].nbytes, r[0].nbytes],
    "_transformer_encoder_layer_fwd": _encoder_layer,
    "renorm": lambda a, r, card: [4 * a["self"].shape[a["dim"]]],
    "_fft_c2r": lambda a, r, card: [a["self"].nbytes],
    "nonzero": lambda a, r, card: [[8], [sorting.scan(a["self"].numel(), 4)]],
    "_scaled_dot_product_flash_attention": attention_scratch.flash_forward,
    "_scaled_dot_product_cudnn_attention_backward": attention_scratch.cudnn_backward,
    "_scaled_dot_product_efficient_attention": attention_scratch.efficient_forward,
    "_scaled_dot_product_efficient_attention_backward": attention_scratch.efficient_backward,
    "_scaled_dot_product_flash_attention_backward": attention_scratch.flash_backward,
    "convolution": convolution.forward_scratch,
    **{name: _native_norm(8) for name in ("native_batch_norm", "cudnn_batch_norm")},
    **{f"{name}_backward": _native_norm(12) for name in ("native_batch_norm", "cudnn_batch_norm")},
    **linalg.RULES,
}
_RULES["median"] = lambda a, r, card: (
    [] if "dim" in a and a["dim"] is not None else _sorted_copy(a["self"])
)
_RULES["nanmedian"] = _RULES["median"]


def _sorted_copy(tensor: torch.Tensor) -> list:
    flat = tensor.reshape(-1)
    return [flat.nbytes, [8 * flat.numel(), *sorting.sort_scratch(flat, 0)]]


# What begins so: optimisers' loops, factories, results given as arguments of a test.
_FAMILIES = ("_foreach_", "_fused_adam", "_fused_sgd", "_fused_adagrad", "new_", "rand", "upsample")
_FAMILIES += ("empty", "zeros", "ones", "full", "_upsample", "sym_", "_assert")
_TAKE_NONE = set(
    """
    _adaptive_avg_pool2d _adaptive_avg_pool2d_backward _adaptive_avg_pool3d
    _adaptive_avg_pool3d_backward _addmm_activation _batch_norm_no_update
    _batch_norm_with_update _conj_physical _convert_weight_to_int4pack _dirichlet_grad
    _efficient_attention_forward _embedding_bag _embedding_bag_forward_only _fft_c2c _fft_r2c
    _flash_attention_forward _fused_dropout _fused_rms_norm _fused_rms_norm_backward _grouped_mm
    _int_mm _is_all_true _is_any_true _local_scalar_dense _log_softmax
    _log_softmax_backward_data _masked_softmax _masked_softmax_backward _pdist_forward
    _prelu_kernel _prelu_kernel_backward _reshape_copy _resize_output _safe_softmax
    _sample_dirichlet _scaled_dot_product_attention_math _scaled_dot_product_cudnn_attention
    _scaled_mm _softmax _standard_gamma _to_copy _unsafe_index _unsafe_view
    _weight_norm_interface adaptive_max_pool2d adaptive_max_pool2d_backward addbmm addmm addmv
    addr arange as_strided_copy avg_pool2d avg_pool2d_backward avg_pool3d avg_pool3d_backward
    baddbmm bernoulli bmm bucketize cat cauchy channel_shuffle clone col2im complex
    constant_pad_nd copy cross cummax cummin detach diag_embed diagonal_scatter dot
    equal expand_copy exponential eye fill flip floor_divide fractional_max_pool2d gather
    geometric glu glu_backward grid_sampler_2d grid_sampler_2d_backward grid_sampler_3d
    grid_sampler_3d_backward hardtanh hash_tensor heaviside huber_loss index_add
    index_copy index_fill index_select isin_scalar kthvalue lift lift_fresh lift_fresh_copy
    linear linspace log_normal logspace masked_fill masked_select matmul max_pool2d_with_indices
    max_pool2d_with_indices_backward max_pool3d_with_indices max_pool3d_with_indices_backward
    max_unpool2d max_unpool3d mm mse_loss mse_loss_backward mv native_dropout
    native_dropout_backward  nll_loss2d_backward
    nll_loss2d_forward nll_loss_backward nll_loss_forward normal permute_copy pixel_shuffle
    pixel_unshuffle poisson polar put random reflection_pad1d reflection_pad1d_backward
    reflection_pad2d reflection_pad2d_backward reflection_pad3d reflection_pad3d_backward repeat
    replication_pad1d replication_pad1d_backward replication_pad2d replication_pad2d_backward
    replication_pad3d replication_pad3d_backward resize roll rot90 rrelu_with_noise
    scalar_tensor scatter scatter_add searchsorted select_backward select_scatter set
    slice_backward slice_scatter smooth_l1_loss split_with_sizes_copy squeeze_copy stack
    _thnn_fused_gru_cell _thnn_fused_gru_cell_backward std_to_copy t_copy take trace
    transpose_copy trapezoid tril tril_indices triu triu_indices
    unfold_backward unfold_copy uniform unsafe_split unsqueeze_copy
    value_selecting_reduction_backward view_copy where zero _weight_int4pack_mm
    bitsandbytes::quantize_4bit bitsandbytes::quantize_blockwise bitsandbytes::dequantize_4bit
    bitsandbytes::dequantize_blockwise bitsandbytes::int8_linear_matmul
    bitsandbytes::int8_vectorwise_dequant
    """.split()
)
# Operators whose memory was traced in few shapes only: at most three times their largest tensor.
_BOUNDED = {"_cdist_forward", "mode", "unique_dim", "unique_consecutive", "_histogramdd"}
_BOUNDED |= {
    "convolution",
    "_linalg_svd",
    "_linalg_eigh",
    "linalg_qr",
    "_ctc_loss",
    "_trilinear",
    "isin",
    "_thnn_fused_lstm_cell",
}
# Charged with what their traces have in common, which is not exact for every shape.
ESTIMATED = {"aten::convolution", "aten::_linalg_svd", "aten::_linalg_eigh", "aten::linalg_qr"}
