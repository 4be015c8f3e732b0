"""cuBLAS's workspaces, kernels that are loaded on first use, and the order of results.

Read off traces of PyTorch's allocator on H100 and H200 (torch 2.11, 2026-11-25 and -26;
``benchmarks/memory.py --trace``).
"""

from simgpu.units import MIB

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

# Kernels that make their results in another order than they give them: cuDNN's attention first has
# seed and offset of its random numbers, dropout the mask (aten/src/ATen/native/cuda/Dropout.cu).
# Those of the memory-efficient kernel are on the host (transformers/cuda/attention.cu). Scales come
# before the numbers (backends/cuda/ops.py of bitsandbytes).
_ORDERS = {
    "aten::native_dropout": (1, 0),
    "aten::_scaled_dot_product_cudnn_attention": (2, 3, 0, 1),
    "aten::_scaled_dot_product_efficient_attention": (0, 1),
    "bitsandbytes::quantize_4bit": (1, 0),
    "bitsandbytes::quantize_blockwise": (1, 0),
}


def in_order(name: str, results: list) -> list:
    """The results of an operator that are on the card, in the order in which it makes them."""
    order = _ORDERS.get(name)
    return results if order is None else [results[place] for place in order]
