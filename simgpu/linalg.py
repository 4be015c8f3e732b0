"""What linear algebra takes on CUDA besides its results: cuSOLVER's workspaces.

The calls are those of aten/src/ATen/native/cuda/linalg/BatchLinearAlgebraLib.cpp. How much room
cuSOLVER asks for is not published: the functions below meet what was traced of square matrices
from 64 to 1024 rows (H100, torch 2.11, CUDA 13.0, 2026-11-27) to within 2 %. Of others the least
that was traced is charged.
"""

from simgpu.units import MIB

# Decompositions of a matrix no larger run in one block of threads; larger eigenproblems divide.
_BATCHED_ROWS, _JACOBI_ROWS = 32, 512
_LEAST_BYTES = 3 * MIB
# Of these only few shapes were traced, or none.
BOUNDED = {"linalg_eig", "_linalg_eigvals", "linalg_lstsq", "linalg_matrix_exp", "linalg_eigvals"}
BOUNDED |= {"geqrf", "ormqr", "linalg_householder_product", "cholesky_inverse", "lu_unpack"}


def _singular_values(a, results, card):
    tensor = a["A"]
    rows, columns = tensor.shape[-2:]
    vectors = [] if a["compute_uv"] else [tensor.nbytes] * 2
    if max(rows, columns) <= _BATCHED_ROWS:
        workspace = 3968
    elif rows == columns:
        workspace = (2 * rows**2 + rows**2 // 256 + 65 * rows + 1056) * tensor.itemsize
    else:
        workspace = _LEAST_BYTES + (tensor.nbytes if rows < columns else 0)
    return [4, tensor.nbytes, *vectors, workspace]


def _eigenvalues(a, results, card):
    tensor = a["A"]
    rows = tensor.shape[-1]
    vectors = [] if a["compute_v"] else [tensor.nbytes]
    if rows <= _JACOBI_ROWS:
        workspace = (rows**2 + 36 * rows + 740) * tensor.itemsize
    else:
        workspace = (4 * rows**2 + 127 * rows + 33_000) * tensor.itemsize
    return [*vectors, 4, workspace]


def _orthogonal(a, results, card):
    tensor = a["A"]
    rows, columns = tensor.shape[-2:]
    if tensor.ndim > 2 and max(rows, columns) <= _BATCHED_ROWS * 2:
        return []  # one kernel for all
    factor = max(_LEAST_BYTES, 2 * MIB + 1024 * columns * tensor.itemsize) + 128
    return [min(rows, columns) * tensor.itemsize, [4, factor]]


def _inverse(a, results, card):
    """The factors, their pivots, and the unit matrix that is solved for."""
    tensor = a["A"]
    return [tensor.nbytes, 4 * tensor.shape[-1], tensor.nbytes, *[8 * tensor.shape[-1]] * 3]


def _solution(a, results, card):
    return [*[8 * a["A"].shape[-1]] * 3, a["B"].nbytes]


def _factors(a, results, card):
    return [8 * a["A"].shape[-1] + 4096]


RULES = {
    "_linalg_svd": _singular_values,
    "_linalg_eigh": _eigenvalues,
    "linalg_qr": _orthogonal,
    "linalg_inv_ex": _inverse,
    "_linalg_solve_ex": _solution,
    "linalg_cholesky_ex": lambda a, results, card: [4 * results[0].shape[-1]],
    "linalg_lu_factor_ex": _factors,
    "_linalg_det": _factors,
    "_linalg_slogdet": _factors,
    "linalg_solve_triangular": lambda a, results, card: [],
    "_cholesky_solve_helper": lambda a, results, card: [results[0].nbytes],
}
