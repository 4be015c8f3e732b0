"""Products with weights of four bits, as torchao keeps them for its own kernels, for a few rows.

A number n of 0 to 15 stands for (n - 8) scale + zero; scale and zero are of a row's 128 columns.
Four bits come so fast from memory that arithmetic could be the limit, hence:

- Or-ed into the bits of 128.0 in bfloat16, whose last bit counts one, n is the number 128 + n: two
  numbers in a word of 32 bits are made by one shift, one and, one or.
- Tensor cores multiply, for one row too, whose numbers they are given eight times.
- Scale and zero are applied to the sums of 128 columns: with s of n's products and t of x alone,
  the sum is scale (s - 136 t) + zero t.
- The order of columns is the one in which threads have the numbers, for both operands, so that none
  changes hands. Where Triton lays them out otherwise the result is the same, and comes later.

torchao's int32 (rows / 8, groups, 32, 4) is made for 8 rows and 128 columns at a time: the 32 are
8 rows by 4 pairs of columns, 2 apart; the 4 are 32 columns apart. In a word the low and the high
half are two neighbours, and bits 0, 4, 8 and 12 of both are 8 columns apart. There are groups for
columns up to a multiple of 1024.
"""

from simgpu.kernels import language as tl
from simgpu.kernels import triton

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # on simulated cards alone, where nobody calls them
    gdc_launch_dependents = gdc_wait = None


@triton.jit
def _neighbours(words, SHIFT: tl.constexpr, DTYPE: tl.constexpr):
    """128 + n for two neighbours of every word: (..., 2)."""
    both = (words >> SHIFT) & 0x000F000F
    if DTYPE == tl.bfloat16:
        both = both | 0x43004300
        low = (both & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = (both >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        low, high = ((both & 15) + 128).to(DTYPE), ((both >> 16) + 128).to(DTYPE)
    return tl.join(low, high)


@triton.jit
def _numbers(words, DTYPE: tl.constexpr, GROUPS: tl.constexpr, BN: tl.constexpr):
    """128 + n of words (BN / 8, GROUPS, 8, 16) as a matrix for each group: (GROUPS, BN, 128)."""
    near = tl.join(_neighbours(words, 0, DTYPE), _neighbours(words, 4, DTYPE))
    far = tl.join(_neighbours(words, 8, DTYPE), _neighbours(words, 12, DTYPE))
    # Of columns: 2s, 32s, 1s, 8s, 16s.
    every = tl.reshape(tl.join(near, far), [BN // 8, GROUPS, 8, 4, 4, 2, 2, 2])
    return tl.reshape(tl.permute(every, (1, 0, 2, 4, 7, 3, 6, 5)), [GROUPS, BN, 128])


@triton.jit
def _repeat(values, N: tl.constexpr, KNOWN: tl.constexpr, R: tl.constexpr):
    """(N, KNOWN) over and over to (N, R)."""
    if KNOWN == R:
        return values
    return tl.reshape(tl.broadcast_to(values[:, None, :], [N, R // KNOWN, KNOWN]), [N, R])


@triton.jit
def weigh_int4(x, gain, weight, scales, outputs, first, count, OUTPUTS: tl.constexpr,
               K: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr,
               EPSILON: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr,
               PDL: tl.constexpr):  # fmt: skip
    """As ``_weigh`` of kernels; of R = 8 the first ROWS are to be used.

    ``scales`` has scale and zero in an int32, first all groups of the weight's first part, for each
    its rows, then those of the next part. For an output ``first`` and ``count`` are the part's
    first row and its rows.
    """
    GROUPS: tl.constexpr = BK // 128  # a turn
    ALL: tl.constexpr = K // 128
    KEPT: tl.constexpr = (K + 1023) // 1024 * 8
    KNOWN: tl.constexpr = 1 if ROWS == 1 else (2 if ROWS == 2 else (4 if ROWS <= 4 else 8))
    DTYPE: tl.constexpr = x.dtype.element_ty
    group, k, row = tl.arange(0, GROUPS), tl.arange(0, 128), tl.arange(0, KNOWN)
    eights = tl.reshape(outputs, [BN // 8, 8])
    at = weight + (eights // 8 * (KEPT * 128) + eights % 8 * 16)[:, None, :, None]
    at += group[None, :, None, None] * 128 + tl.arange(0, 16)[None, None, None, :]
    inside = (eights < OUTPUTS)[:, None, :, None]
    pairs = scales + (first * KEPT + outputs - first)[None, :] + group[:, None] * count
    within = (outputs < OUTPUTS)[None, :]
    if AHEAD:
        words = tl.load(at, mask=inside & (group < ALL)[None, :, None, None], other=0,
                        eviction_policy="evict_first")  # fmt: skip
        pair = tl.load(pairs, mask=within & (group < ALL)[:, None], other=0)
    if PDL:
        gdc_wait()
    sums = tl.zeros([GROUPS, BN, R], tl.float32)
    squares = tl.zeros([GROUPS, KNOWN, 128], tl.float32)
    for start in range(0, ALL, GROUPS):
        this = start + group
        known = (this < ALL)[:, None]
        if AHEAD:
            more = this + GROUPS < ALL
            next_words = tl.load(at + (start + GROUPS) * 128,
                                 mask=inside & more[None, :, None, None], other=0,
                                 eviction_policy="evict_first")  # fmt: skip
            next_pair = tl.load(pairs + (start + GROUPS) * count, mask=within & more[:, None],
                                other=0)  # fmt: skip
        else:
            words = tl.load(at + start * 128, mask=inside & (this < ALL)[None, :, None, None],
                            other=0, eviction_policy="evict_first")  # fmt: skip
            pair = tl.load(pairs + start * count, mask=within & known, other=0)
        column = this[:, None] * 128 + k[None, :]
        some = tl.load(x + row[None, :, None] * K + column[:, None, :],
                       mask=(row < ROWS)[None, :, None] & known[:, :, None], other=0.0)  # fmt: skip
        if NORM:
            some = some.to(tl.float32)
            squares += some * some
            scale = tl.load(gain + column, mask=known, other=0.0).to(tl.float32)
            some = (some * scale[:, None, :]).to(DTYPE)
        alone = tl.sum(some.to(tl.float32), 2)
        # 16s, 8s, 2s, 1s, in the order of the numbers.
        turned = tl.permute(tl.reshape(some, [GROUPS, KNOWN, 8, 2, 4, 2]), (0, 2, 4, 3, 5, 1))
        turned = tl.reshape(turned, [GROUPS * 128, KNOWN])
        turned = tl.reshape(_repeat(turned, GROUPS * 128, KNOWN, R), [GROUPS, 128, R])
        products = tl.dot(_numbers(words, DTYPE, GROUPS, BN), turned, input_precision="ieee")
        scale = (pair << 16).to(tl.float32, bitcast=True)[:, :, None]
        zero = (pair & -65536).to(tl.float32, bitcast=True)[:, :, None]
        alone = _repeat(alone, GROUPS, KNOWN, R)[:, None, :]
        sums += products * scale + alone * (zero - 136.0 * scale)
        if AHEAD:
            words, pair = next_words, next_pair
    if PDL:
        gdc_launch_dependents()
    sums = tl.sum(sums, 0)
    if NORM:
        mean = tl.sum(tl.sum(squares, 2), 0)[None, :] / K
        sums *= _repeat(tl.rsqrt(mean + EPSILON), 1, KNOWN, R)
    return sums
