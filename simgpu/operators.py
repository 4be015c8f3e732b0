"""cuBLAS's workspaces and the memory of kernels that are loaded on first use.

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
