"""Products with weights of eight and four bits, as torchao keeps them for its own kernels.

They come so fast from memory that arithmetic could be the limit, hence:

- Tensor cores multiply, for one row too, whose numbers they are given eight times.
- A number n of 0 to 15 in four bits stands for (n - 8) scale + zero. Or-ed into the bits of 128.0
  in bfloat16, whose last bit counts one, n is the number 128 + n: two numbers in a word of 32 bits
  are made by a shift and one more instruction.
- Scale and zero belong to a row's 128 columns, and are applied to the sums of these: with s of n's
  products and t of x alone the sum is scale (s - 136 t) + zero t.
- The order of columns is the one in which threads get the numbers, for both operands, so that none
  changes hands. Where Triton lays them out otherwise the result is the same, and comes later.

torchao's words of four bits, int32 (rows / 8, groups, 32, 4), are made for 8 rows and 128 columns
at a time: the 32 are 8 rows by 4 pairs of columns, 2 apart; the 4 are 32 columns apart. In a word
the low and the high half are two neighbours, and bits 0, 4, 8 and 12 of both are 8 columns apart.
There are groups for columns up to a multiple of 1024.
"""

from simgpu.kernels import language as tl
from simgpu.kernels import triton

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # on simulated cards alone, where nobody calls them
    gdc_launch_dependents = gdc_wait = None


@triton.jit
def output_of(begin, each, RUN: tl.constexpr, APART: tl.constexpr):
    """The output of each row of a tile: one after another, or with APART those of two halves of the
    weight, so many rows apart, a RUN of one and a RUN of the other in turn."""
    if APART > 0:
        each = each // (2 * RUN) * RUN + each % RUN + each // RUN % 2 * APART
    return begin + each


@triton.jit
def _neighbours(words, SHIFT: tl.constexpr, DTYPE: tl.constexpr):
    """128 + n for two neighbours of every word: (..., 2)."""
    if DTYPE == tl.bfloat16:
        # (words >> SHIFT) & 0x000F000F | 0x43004300, which the compiler makes two instructions of.
        both = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [words >> SHIFT, 0x000F000F, 0x43004300],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
        low = (both & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = (both >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        low = (((words >> SHIFT) & 15) + 128).to(DTYPE)
        high = (((words >> (SHIFT + 16)) & 15) + 128).to(DTYPE)
    return tl.join(low, high)


@triton.jit
def _numbers(tile, DTYPE: tl.constexpr, BITS: tl.constexpr, PIECES: tl.constexpr,
             BN: tl.constexpr):  # fmt: skip
    """A tile as one matrix for each piece, (PIECES, BN, columns); of four bits 128 + n."""
    if BITS == 8:
        # Of columns: 16s, 4s, 1s.
        every = tl.reshape(tile.to(DTYPE), [BN // 8, PIECES, 8, 4, 4, 4])
        every = tl.reshape(tl.permute(every, (1, 0, 2, 4, 3, 5)), [PIECES, BN, 64])
    else:
        near = tl.join(_neighbours(tile, 0, DTYPE), _neighbours(tile, 4, DTYPE))
        far = tl.join(_neighbours(tile, 8, DTYPE), _neighbours(tile, 12, DTYPE))
        # Of columns: 2s, 32s, 1s, 8s, 16s.
        every = tl.reshape(tl.join(near, far), [BN // 8, PIECES, 8, 4, 4, 2, 2, 2])
        every = tl.reshape(tl.permute(every, (1, 0, 2, 4, 7, 3, 6, 5)), [PIECES, BN, 128])
    return every


@triton.jit
def _turned(some, BITS: tl.constexpr, PIECES: tl.constexpr, KNOWN: tl.constexpr,
            R: tl.constexpr):  # fmt: skip
    """x (PIECES, KNOWN, columns), its columns as ``_numbers`` has them: (PIECES, columns, R)."""
    if BITS == 8:
        COLUMNS: tl.constexpr = 64
        some = tl.permute(tl.reshape(some, [PIECES, KNOWN, 4, 4, 4]), (0, 3, 2, 4, 1))
    else:
        COLUMNS: tl.constexpr = 128
        some = tl.permute(tl.reshape(some, [PIECES, KNOWN, 8, 2, 4, 2]), (0, 2, 4, 3, 5, 1))
    some = _repeat(tl.reshape(some, [PIECES * COLUMNS, KNOWN]), PIECES * COLUMNS, KNOWN, R)
    return tl.reshape(some, [PIECES, COLUMNS, R])


@triton.jit
def _repeat(values, N: tl.constexpr, KNOWN: tl.constexpr, R: tl.constexpr):
    """(N, KNOWN) over and over to (N, R)."""
    if KNOWN < R:
        values = tl.broadcast_to(values[:, None, :], [N, R // KNOWN, KNOWN])
        values = tl.reshape(values, [N, R])
    return values


@triton.jit
def weigh_packed(x, gain, weight, scales, begin, outputs, part, count, APART: tl.constexpr,
                 OUTPUTS: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr,
                 NORM: tl.constexpr, EPSILON: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr,
                 BK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """As ``_weigh`` of kernels, but for the scales of eight bits; of R = 8 the first ROWS are to be
    used.

    Of four bits ``scales`` has scale and zero in an int32, first all groups of the weight's first
    part, for each its rows, then those of the next part; for each output ``part`` is its part's
    first row, and ``count`` its rows. A turn takes 8 rows by 8 and columns in pieces. Four bits are
    asked for a turn ahead, into registers, the first before the kernel in front has ended; eight
    bits, which registers would hold one by one, as the compiler plans it.
    """
    COLUMNS: tl.constexpr = 64 if BITS == 8 else 128  # of a piece
    PIECES: tl.constexpr = BK // COLUMNS
    KNOWN: tl.constexpr = 1 if ROWS == 1 else (2 if ROWS == 2 else (4 if ROWS <= 4 else 8))
    DTYPE: tl.constexpr = x.dtype.element_ty
    piece, k, row = tl.arange(0, PIECES), tl.arange(0, COLUMNS), tl.arange(0, KNOWN)
    if BITS == 8:
        each = tl.arange(0, BN * PIECES)
        ours = each // 8 % PIECES
        output = output_of(begin, each // (8 * PIECES) * 8 + each % 8, 8, APART)
        first = output.to(tl.int64) * K + ours * COLUMNS
        TURN: tl.constexpr = BK
    else:
        KEPT: tl.constexpr = (K + 1023) // 1024 * 8
        each = tl.arange(0, BN // 8 * PIECES)
        ours, output = each % PIECES, output_of(begin, each // PIECES * 8, 8, APART)
        first = output // 8 * (KEPT * 128) + ours * 128
        TURN: tl.constexpr = PIECES * 128
        pairs = scales + (part * KEPT + outputs - part)[None, :] + piece[:, None] * count
        within = (outputs < OUTPUTS)[None, :]
    inside = output < OUTPUTS
    at = weight + first[:, None] + k[None, :]
    if BITS == 4:
        tile = tl.load(at, mask=(inside & (ours * COLUMNS < K))[:, None], other=0,
                       eviction_policy="evict_first")  # fmt: skip
        pair = tl.load(pairs, mask=within & (piece * COLUMNS < K)[:, None], other=0)
    if PDL:
        gdc_wait()
    sums = tl.zeros([PIECES, BN, R], tl.float32)
    squares = tl.zeros([PIECES, KNOWN, COLUMNS], tl.float32)
    for turn in range(0, tl.cdiv(K, BK)):
        start = turn * BK
        if BITS == 4:
            more = start + BK + ours * COLUMNS < K
            next_tile = tl.load(at + (turn + 1) * TURN, mask=(inside & more)[:, None], other=0,
                                eviction_policy="evict_first")  # fmt: skip
            more = (start + BK + piece * COLUMNS < K)[:, None]
            next_pair = tl.load(pairs + (turn + 1) * PIECES * count, mask=within & more, other=0)
        else:
            known = (inside & (start + ours * COLUMNS < K))[:, None]
            tile = tl.load(at + turn * TURN, mask=known, other=0, eviction_policy="evict_first")
        column = start + piece[:, None] * COLUMNS + k[None, :]
        some = tl.load(x + row[None, :, None] * K + column[:, None, :],
                       mask=(row < ROWS)[None, :, None] & (column < K)[:, None, :],
                       other=0.0)  # fmt: skip
        if NORM:
            some = some.to(tl.float32)
            squares += some * some
            scale = tl.load(gain + column, mask=column < K, other=0.0).to(tl.float32)
            some = (some * scale[:, None, :]).to(DTYPE)
        numbers = _numbers(tile, DTYPE, BITS, PIECES, BN)
        turned = _turned(some, BITS, PIECES, KNOWN, R)
        if BITS == 8:
            sums = tl.dot(numbers, turned, sums, input_precision="ieee")
        else:
            scale = (pair << 16).to(tl.float32, bitcast=True)
            zero = (pair & -65536).to(tl.float32, bitcast=True) - 136.0 * scale
            alone = _repeat(tl.sum(some.to(tl.float32), 2), PIECES, KNOWN, R)[:, None, :]
            products = tl.dot(numbers, turned, input_precision="ieee")
            sums += products * scale[:, :, None] + alone * zero[:, :, None]
            tile, pair = next_tile, next_pair
    if PDL:
        gdc_launch_dependents()
    sums = tl.sum(sums, 0)
    if NORM:
        mean = tl.sum(tl.sum(squares, 2), 0)[None, :] / K
        sums *= _repeat(tl.rsqrt(mean + EPSILON), 1, KNOWN, R)
    return sums
