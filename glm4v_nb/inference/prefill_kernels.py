"""What stands between the products of a prefill, in Triton: each a pass over its input, where plain
PyTorch takes two to ten.

A prefill multiplies thousands of rows at once, which the libraries do well. Between the products
every operator reads and writes whole activations, so that the memory's bandwidth is their limit:
norm, residual, rotation and gate are one kernel each. Sums are in float32, and a result is rounded
once. ``R`` rows of ``K`` numbers, in blocks of ``BK``, are one program.
"""

from simgpu.kernels import language as tl
from simgpu.kernels import triton


@triton.jit
def add_rms_norm(x, delta, gain, total, y, rows, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
                 ADD: tl.constexpr, EPSILON: tl.constexpr):  # fmt: skip
    """y = the normalised x, all (rows, K), times gain (K); with ADD of total = x + delta, too."""
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[:, None]
    k = tl.arange(0, BK)[None, :]
    at, mask = row * K + k, (row < rows) & (k < K)
    sums = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        sums += tl.load(delta + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(total + at, sums, mask=mask)
    scale = tl.rsqrt(tl.sum(sums * sums, 1) / K + EPSILON)[:, None]
    weight = tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(y + at, sums * scale * weight, mask=mask)


@triton.jit
def layer_norm_add(x, delta, gain, bias, y, rows, K: tl.constexpr, R: tl.constexpr,
                   BK: tl.constexpr, EPSILON: tl.constexpr):  # fmt: skip
    """y = x + the normalised delta, all (rows, K), times gain plus bias, both (K)."""
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[:, None]
    k = tl.arange(0, BK)[None, :]
    at, mask = row * K + k, (row < rows) & (k < K)
    some = tl.load(delta + at, mask=mask, other=0.0).to(tl.float32)
    some = tl.where(mask, some - (tl.sum(some, 1) / K)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(some * some, 1) / K + EPSILON)[:, None]
    weight = tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)
    shift = tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)
    before = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, before + some * scale * weight + shift, mask=mask)


@triton.jit
def gate(both, y, rows, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr):
    """y (rows, K) = silu(gate) up; a row of both (rows, 2 K) holds all gates, then all ups."""
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[:, None]
    k = (tl.program_id(1) * BK + tl.arange(0, BK))[None, :]
    at, mask = row * 2 * K + k, (row < rows) & (k < K)
    gates = tl.load(both + at, mask=mask, other=0.0).to(tl.float32)
    ups = tl.load(both + at + K, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * K + k, gates * tl.sigmoid(gates) * ups, mask=mask)


@triton.jit
def rotate(heads, cosines, sines, rows, HEADS: tl.constexpr, D: tl.constexpr, TURNED: tl.constexpr,
           H: tl.constexpr, ROTARY: tl.constexpr, R: tl.constexpr):  # fmt: skip
    """Turn neighbours among the first ROTARY numbers of the first TURNED heads, in place.

    heads (rows, HEADS, D); cosines and sines (rows, ROTARY), of which the first half is that of the
    pairs, as transformers has them. A program takes H heads of R rows.
    """
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[:, None, None]
    head = (tl.program_id(1) * H + tl.arange(0, H))[None, :, None]
    number, pair = tl.arange(0, ROTARY)[None, None, :], tl.arange(0, ROTARY // 2)[None, None, :]
    cosine = tl.load(cosines + row * ROTARY + pair, mask=row < rows, other=0.0).to(tl.float32)
    sine = tl.load(sines + row * ROTARY + pair, mask=row < rows, other=0.0).to(tl.float32)
    at, mask = heads + (row * HEADS + head) * D + number, (row < rows) & (head < TURNED)
    both = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(both, [R, H, ROTARY // 2, 2]))
    both = tl.join(even * cosine - odd * sine, odd * cosine + even * sine)
    tl.store(at, tl.reshape(both, [R, H, ROTARY]), mask=mask)
