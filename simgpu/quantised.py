"""bitsandbytes' weights of 4 and 8 bits on simulated cards, and the memory of its operators.

The library makes a weight of a class of its own out of a tensor, which a tensor without numbers
cannot become. Here it stays one, with the attributes that the library's layers ask for. (torchao's
weights hold plain tensors and need no help.) Its operators are taken apart into what their CUDA
kernels allocate.

Source: backends/cuda/ops.py, backends/default/ops.py and functional.py of bitsandbytes 0.50.
"""

import importlib
import warnings
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from wrapt import when_imported, wrap_function_wrapper

from simgpu.device import on_card
from simgpu.rig import Rig
from simgpu.rules import REWRITTEN

_OF_4_BITS = ("blocksize", "compress_statistics", "quant_type", "quant_storage", "module")
_KEPT = {*_OF_4_BITS, "quant_state", "bnb_quantized", "CB", "SCB", "has_fp16_weights"}
_MOST_ROWS = 1536  # from which on the library unpacks weights whatever their shape
_CUDA_OPERATORS = "bitsandbytes.backends.cuda.ops"
# It has functions compiled as it is imported, for devices other than CUDA.
warnings.filterwarnings("ignore", "On simulated cards torch.compile", module=r"bitsandbytes\.")


def _made(model, name: str, numbers: torch.Tensor, attributes: dict) -> torch.nn.Parameter:
    """A quantised weight, as its layer will ask for it."""
    parameter = torch.nn.Parameter(numbers, requires_grad=False)
    vars(parameter).update(attributes)
    model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True
    return parameter


def _on_cards(convert):
    """Replaces the conversion of weights while they are loaded, where they have no numbers."""

    def converted(wrapped, _, args, kwargs):
        first = next(iter(args[0].values()))
        if not isinstance(first[0] if isinstance(first, list) else first, FakeTensor):
            return wrapped(*args, **kwargs)
        model, made = kwargs["model"], {}
        for name, weight in args[0].items():
            weight = weight[0] if isinstance(weight, list) else weight
            layer = model.get_submodule(name.rpartition(".")[0])
            made[name] = convert(model, layer, name, weight)
        return made

    return converted


@_on_cards
def _quantise_4bit(model, layer, name: str, weight: torch.Tensor):
    """As transformers does; the full weight lasts until its caller lets it go."""
    from bitsandbytes import functional

    # A table that the library keeps for good, on the device where it was first wanted.
    tables = vars(model).setdefault("_simulated_tables", {})
    like = {each: vars(layer.weight)[each] for each in _OF_4_BITS}
    options = {each: like[each] for each in _OF_4_BITS[:-1]}
    with mock.patch.object(functional, "name2qmap", tables):
        packed, layer.quant_state = functional.quantize_4bit(weight.contiguous(), **options)
    return _made(
        model, name, packed, like | {"quant_state": layer.quant_state, "bnb_quantized": True}
    )


@_on_cards
def _quantise_8bit(model, layer, name: str, weight: torch.Tensor):
    """As transformers does: by way of the host, and in float16."""
    half = weight.to("cpu").contiguous().to(device=weight.device, dtype=torch.float16)
    numbers, scales, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(half)
    kept = {"CB": numbers, "SCB": scales, "has_fp16_weights": layer.weight.has_fp16_weights}
    return _made(model, name, numbers, kept)


def _moved(wrapped, layer, args, kwargs):
    """``Module._apply`` of a layer: what makes its weight a quantised one goes along, as the
    library's class has it."""
    kept = {name: value for name, value in vars(layer.weight).items() if name in _KEPT}
    wrapped(*args, **kwargs)
    weight = layer.weight
    if isinstance(weight, FakeTensor):
        if state := kept.get("quant_state"):
            state.to(weight.device)
        if kept.get("CB") is not None:
            kept |= {"CB": weight.data, "SCB": kept["SCB"].to(weight.device)}
        vars(weight).update(kept)
    return layer


def _named(wrapped, state, args, kwargs):
    """What a state dict has of a weight's scales: accelerate asks for the names, and the library
    reads a number, which goes to a file with tensors that have none, and so never does."""
    if not isinstance(state.offset, FakeTensor):
        return wrapped(*args, **kwargs)
    with mock.patch.object(state, "offset", SimpleNamespace(item=lambda: 0.0)):
        return wrapped(*args, **kwargs)


def reads_4_bits(activations: torch.Tensor, shape: list[int], blocksize: int, properties) -> bool:
    """Whether a kernel of the library's own multiplies by packed weights (rows, columns) as they
    are, on a card of these ``properties``; otherwise they are unpacked first."""
    rows = activations.numel() // activations.shape[-1]
    if rows > _MOST_ROWS or shape[1] % blocksize:
        return False
    # PyTorch without CUDA lacks a function that is looked up, but not called, on import.
    missing = "_cuda_getCurrentRawStream"
    with mock.patch.object(torch._C, missing, getattr(torch._C, missing, None), create=True):
        library = importlib.import_module(_CUDA_OPERATORS)
    found = (properties.multi_processor_count, properties.major, properties.minor)
    with mock.patch.object(library, "_gpu_dispatch_props", lambda index: found):
        choose = library._gemm_4bit_use_custom_cuda.__wrapped__  # below its cache
        return choose(0, activations.dtype, rows, *shape)


def _gemm_4bit(
    A,
    B,
    shapeB,
    absmax,
    blocksize,
    quant_type,
    bias=None,
    absmax_8bit=None,
    absmax_code=None,
    absmax_offset=None,
):
    if not on_card(A):
        return NotImplemented
    properties = torch.cuda.get_device_properties(A.device)
    if reads_4_bits(A, shapeB, blocksize, properties):
        return A.contiguous().new_empty((*A.shape[:-1], shapeB[0]))
    if absmax_8bit is not None:
        scales = torch.empty_like(absmax_8bit, dtype=torch.float32)
        absmax = scales + absmax_offset  # noqa: F841  (lasts until the end, as there)
    return _linear(A, A.new_empty(shapeB), bias)


def _linear(input, weight, bias):
    """What ``functional.linear`` does on CUDA; here PyTorch would not take it apart."""
    flat = input.reshape(-1, input.shape[-1])
    if bias is None or not input.is_contiguous():
        output = torch.mm(flat, weight.t())
        output = output if bias is None else output.add_(bias)
    else:
        output = torch.addmm(bias, flat, weight.t())
    return output.view(*input.shape[:-1], len(weight))


def _columns_of(large):
    """Those with a number that is large. Whether one is nobody knows here: it is asked, and so an
    assumption that the rig counts, or refuses to make."""
    if torch.ops.aten._local_scalar_dense(large.any()):
        return torch.argwhere(large.any(dim=0)).view(-1)
    return large.new_empty(0, dtype=torch.int64)


def _int8_vectorwise_quant(A, threshold=0.0):
    if not on_card(A):
        return NotImplemented
    scales = A.new_empty(A.numel() // A.shape[-1], dtype=torch.float32)
    numbers, columns = A.new_empty(A.shape, dtype=torch.int8), None
    if threshold > 0:
        large = A.abs() >= threshold  # lasts until the end, as there
        columns = _columns_of(large)
        if scales.numel() > 1:
            numbers[:, columns] = 0
    return numbers, scales, columns


def _int8_vectorwise_dequant(A, stats):
    if not on_card(A):
        return NotImplemented
    # Two results in float32, for a while beside each other.
    return A * stats.view(-1, 1) * (1 / 127)


def _int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, outlier_cols=None, bias=None):
    if not on_card(A):
        return NotImplemented
    library, weights = torch.ops.bitsandbytes, None
    # Which columns have a large number nobody knows: charged is none, and said what all would take.
    Rig.active.note_unmodelled("bitsandbytes::int8_mixed_scaled_mm", _if_all_are_large(A, CB))
    if outlier_cols is not None and outlier_cols.numel():
        large = A[:, outlier_cols].contiguous()
        weights = library.int8_vectorwise_dequant.default(CB[:, outlier_cols].contiguous(), SCB)
        weights = weights.to(A.dtype).t()
    else:
        large = A.new_empty(0)
    output = library.int8_scaled_mm.default(CA, CB, SCA, SCB, bias=bias, dtype=A.dtype)
    return (output if weights is None else output.addmm(large, weights)), large


def _if_all_are_large(activations, weights) -> int:
    """Bytes that a product takes at most besides, with every column of its input apart: indices,
    the input again, weights as they are and twice in float32, and cuBLAS's workspace, where this
    is its first product. The allocator leaves up to 1 MiB of a block unused."""
    workspace = Rig.active.cards[activations.device.index].cublas_workspace_bytes
    return 8 * weights.shape[1] + activations.nbytes + 9 * weights.numel() + workspace + 2**23


def _int8_scaled_mm(A, B, row_stats, col_stats, bias=None, dtype=None):
    if not on_card(A):
        return NotImplemented
    library = torch.ops.bitsandbytes
    sums = library.int8_linear_matmul.default(A, B)
    dtype = dtype or torch.float16
    return library.int8_mm_dequant.default(sums, row_stats, col_stats, dtype=dtype, bias=bias)


def _int8_mm_dequant(A, row_stats, col_stats, dtype=None, bias=None):
    if not on_card(A):
        return NotImplemented
    scaled = torch.empty_like(A, dtype=torch.float16)
    if bias is not None and bias.dtype != torch.float16:
        scaled.add_(bias)
    return scaled.to(dtype or torch.float16)


@when_imported("transformers.integrations.bitsandbytes")
def _prepare(module):
    wrap_function_wrapper(module, "Bnb4bitQuantize.convert", _quantise_4bit)
    wrap_function_wrapper(module, "Bnb8bitQuantize.convert", _quantise_8bit)


@when_imported("bitsandbytes")
def _take_apart(module):
    for layer in (module.nn.Linear4bit, module.nn.Linear8bitLt):
        wrap_function_wrapper(layer, "_apply", _moved)
    wrap_function_wrapper(module.functional.QuantState, "as_dict", _named)
    for rule in (
        _gemm_4bit,
        _int8_vectorwise_quant,
        _int8_vectorwise_dequant,
        _int8_mixed_scaled_mm,
        _int8_scaled_mm,
        _int8_mm_dequant,
    ):
        operator = getattr(torch.ops.bitsandbytes, rule.__name__.removeprefix("_"))
        REWRITTEN[operator.default] = rule
