"""The product within each kernel: tiles of a weight with one row of numbers, or with several.

What counts is that memory never waits. A tile is asked for one turn ahead, into registers, and the
first, which does not depend on the kernel in front, before that has ended. One row is multiplied by
plain sums, in tiles of so few rows of the weight that programs are many, and every part of the card
has as much to do. Several rows are multiplied by tensor cores, which take 16 rows of a weight;
their columns are cut into pieces, which threads share and which are added up in the end.

Weights of eight and four bits are read as torchao keeps them for its own kernels. They come so fast
that arithmetic could be the limit, hence:

- A byte is or-ed into the bits of a float32 where these count ones, for one row; conversions would
  be slower than memory. For several rows the compiler makes bfloat16 of them, by way of the memory
  that threads share: registers would hold them one by one.
- A number n of 0 to 15 in four bits stands for (n - 8) scale + zero. Or-ed into the bits of 128.0
  in bfloat16, whose last bit counts one, n is the number 128 + n: two numbers in a word of 32 bits
  are made by a shift and one more instruction. Tensor cores multiply these for one row, too, which
  they are given eight times.
- Scale and zero belong to a row's 128 columns, and are applied to the sums of these: with s of n's
  products and t of x alone, which tensor cores add up, the sum is scale (s - 136 t) + zero t.
- The order of columns is the one in which threads get the numbers, for both operands, so that none
  changes hands. Where Triton lays them out otherwise the result is the same, and comes later.

torchao's words of four bits, int32 (rows / 8, groups, 32, 4), are made for 8 rows and 128 columns
at a time: the 32 are 8 rows by 4 pairs of columns, 2 apart; the 4 are 32 columns apart. In a word
the low and the high half are two neighbours, and bits 0, 4, 8 and 12 of both are 8 columns apart.
There are groups for columns up to a multiple of 1024.
"""

from simgpu.kernels import interpreting, triton
from simgpu.kernels import language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # on simulated cards alone, where nobody calls them
    gdc_launch_dependents = gdc_wait = None
# The interpreter knows no instructions of a card.
PLAIN = tl.constexpr(interpreting())


@triton.jit
def output_of(begin, each, RUN: tl.constexpr, APART: tl.constexpr):
    """The output of each row of a tile: one after another, or with APART those of two halves of the
    weight, so many rows apart, a RUN of one and a RUN of the other in turn."""
    if APART > 0:
        each = each // (2 * RUN) * RUN + each % RUN + each // RUN % 2 * APART
    return begin + each


@triton.jit
def weigh(x, gain, weight, scales, begin, part, count, APART: tl.constexpr, OUTPUTS: tl.constexpr,
          K: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr,
          EPSILON: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
          PDL: tl.constexpr):  # fmt: skip
    """The sums over k of weight[output, k] x[row, k]: (BN, R); with NORM of x times gain, over
    the root of x's mean square. x is (ROWS, K), weight and scales a ``Weight`` of BITS with OUTPUTS
    rows; of R rows the first ROWS are to be used. ``begin`` and APART say which outputs, see
    ``output_of``, with a RUN of 8 where R is not 1.

    Of four bits ``scales`` has scale and zero in an int32, first all groups of the weight's first
    part, for each its rows, then those of the next part; for each output ``part`` is its part's
    first row, and ``count`` its rows.
    """
    RUN: tl.constexpr = 1 if R == 1 else 8
    outputs = output_of(begin, tl.arange(0, BN), RUN, APART)
    if R == 1:
        sums = _weigh_row(x, gain, weight, outputs, OUTPUTS, K, NORM, EPSILON, BITS, BN, BK, PDL)
    else:
        sums = _weigh_rows(x, gain, weight, scales, begin, outputs, part, count, APART, OUTPUTS, K,
                           ROWS, R, NORM, EPSILON, BITS, BN, BK, PDL)  # fmt: skip
    if BITS == 8:
        sums *= tl.load(scales + outputs, mask=outputs < OUTPUTS, other=0.0)[:, None]
    return sums


@triton.jit
def _weigh_row(x, gain, weight, outputs, OUTPUTS: tl.constexpr, K: tl.constexpr,
               NORM: tl.constexpr, EPSILON: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr,
               BK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Of one row, by plain sums; with eight bits without the scales."""
    if PDL == 2:
        gdc_launch_dependents()
    WORD: tl.constexpr = 4 if BITS == 8 else 1  # numbers in what is loaded at a time
    EACH: tl.constexpr = 128 // BITS  # of a thread, one after another
    words = weight.to(tl.pointer_type(tl.int32)) if BITS == 8 else weight
    k, word = tl.arange(0, BK), tl.arange(0, BK // WORD)
    within = (outputs < OUTPUTS)[:, None]
    at = words + outputs.to(tl.int64)[:, None] * (K // WORD) + word[None, :]
    tile = tl.load(at, mask=within & (word < K // WORD)[None, :], other=0,
                   eviction_policy="evict_first")  # fmt: skip
    if PDL:
        gdc_wait()
    sums, squares = tl.zeros([BN, BK // EACH], tl.float32), tl.zeros([BK], tl.float32)
    for start in range(0, K, BK):
        column = start + k
        if BK < K:
            more = (word < (K - BK - start) // WORD)[None, :]
            following = tl.load(at + (start + BK) // WORD, mask=within & more, other=0,
                                eviction_policy="evict_first")  # fmt: skip
        some = tl.load(x + column, mask=column < K, other=0.0).to(tl.float32)
        if NORM:
            squares += some * some
            some *= tl.load(gain + column, mask=column < K, other=0.0).to(tl.float32)
        if BITS == 8:
            # With its sign turned over a byte is 128 more, which ``_bytes`` takes away again.
            turned = tile if PLAIN else tile ^ -0x7F7F7F80
            first, second = _bytes(turned)
            third, fourth = _bytes(turned >> 16)
            both = tl.join(tl.join(first, third), tl.join(second, fourth))
            numbers = tl.reshape(both, [BN, BK])
        else:
            numbers = tile.to(tl.float32)
        # Those of a thread are added up at once, which takes a register instead of EACH.
        products = tl.reshape(numbers * some[None, :], [BN, BK // EACH, EACH])
        sums += tl.sum(products, 2)
        if BK < K:
            tile = following
    if PDL == 1:
        gdc_launch_dependents()
    sums = tl.sum(sums, 1)[:, None]
    if NORM:
        sums *= tl.rsqrt(tl.sum(squares, 0) / K + EPSILON)
    return sums


@triton.jit
def _bytes(words):
    """The first two signed bytes of every word, as float32: but for the interpreter each came with
    its sign turned over."""
    if PLAIN:
        first = ((words << 24) >> 24).to(tl.float32)
        second = ((words << 16) >> 24).to(tl.float32)
    else:
        # Or-ed into 2^23 or 2^15 a byte counts ones; these and 128 are subtracted.
        first = tl.inline_asm_elementwise(
            "{ .reg .b32 t; lop3.b32 t, $1, 0xFF, 0x4B000000, 0xEA; add.f32 $0, t, 0fCB000080; }",
            "=f,r", [words], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
        second = tl.inline_asm_elementwise(
            "{ .reg .b32 t; lop3.b32 t, $1, 0xFF00, 0x47000000, 0xEA; add.f32 $0, t, 0fC7008000; }",
            "=f,r", [words], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return first, second


@triton.jit
def _weigh_rows(x, gain, weight, scales, begin, outputs, part, count, APART: tl.constexpr,
                OUTPUTS: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr,
                NORM: tl.constexpr, EPSILON: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr,
                BK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Of several rows, or with four bits, by tensor cores; with eight without the scales."""
    if PDL == 2:
        gdc_launch_dependents()
    COLUMNS: tl.constexpr = 512 // BITS  # of a piece
    PIECES: tl.constexpr = BK // COLUMNS
    KNOWN: tl.constexpr = 1 if ROWS == 1 else (2 if ROWS == 2 else (4 if ROWS <= 4 else 8))
    DTYPE: tl.constexpr = x.dtype.element_ty
    piece, k, row = tl.arange(0, PIECES), tl.arange(0, COLUMNS), tl.arange(0, KNOWN)
    if BITS > 4:
        each, word = tl.arange(0, BN * PIECES), tl.arange(0, COLUMNS)
        ours = each // 8 % PIECES
        output = output_of(begin, each // (8 * PIECES) * 8 + each % 8, 8, APART)
        first = output.to(tl.int64) * K + ours * COLUMNS
        TURN: tl.constexpr = BK
    else:
        KEPT: tl.constexpr = (K + 1023) // 1024 * 8
        each, word = tl.arange(0, BN // 8 * PIECES), tl.arange(0, 128)
        ours, output = each % PIECES, output_of(begin, each // PIECES * 8, 8, APART)
        first = output // 8 * (KEPT * 128) + ours * 128
        TURN: tl.constexpr = PIECES * 128
        pairs = scales + (part * KEPT + outputs - part)[None, :] + piece[:, None] * count
        within = (outputs < OUTPUTS)[None, :]
    inside = (output < OUTPUTS)[:, None]
    # Of 16 bits a piece may have columns of which there are none.
    place = ours[:, None] * COLUMNS + (word[None, :] if BITS == 16 else 0)
    at = weight + first[:, None] + word[None, :]
    if BITS != 8:
        tile = tl.load(at, mask=inside & (place < K), other=0, eviction_policy="evict_first")
    if BITS == 4:
        pair = tl.load(pairs, mask=within & (piece * COLUMNS < K)[:, None], other=0)
    if PDL:
        gdc_wait()
    sums = tl.zeros([PIECES, BN, R], tl.float32)
    squares = tl.zeros([PIECES, KNOWN, COLUMNS], tl.float32)
    for turn in range(0, tl.cdiv(K, BK)):
        start = turn * BK
        if BITS == 8:
            tile = tl.load(at + turn * TURN, mask=inside & (start + place < K), other=0,
                           eviction_policy="evict_first")  # fmt: skip
        elif BK < K:
            next_tile = tl.load(at + (turn + 1) * TURN, mask=inside & (start + BK + place < K),
                                other=0, eviction_policy="evict_first")  # fmt: skip
            if BITS == 4:
                more = (start + BK + piece * COLUMNS < K)[:, None]
                next_pair = tl.load(pairs + (turn + 1) * PIECES * count, mask=within & more,
                                    other=0)  # fmt: skip
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
        if BITS > 4:
            sums = tl.dot(numbers, turned, sums, input_precision="ieee")
        else:
            scale = (pair << 16).to(tl.float32, bitcast=True)
            zero = (pair & -65536).to(tl.float32, bitcast=True) - 136.0 * scale
            two = _ones(tile, DTYPE)
            four = tl.join(two, two)
            ones = _matrix(four, four, PIECES, BN)
            alone = tl.dot(ones, turned, input_precision="ieee")
            products = tl.dot(numbers, turned, input_precision="ieee")
            sums += products * scale[:, :, None] + alone * zero[:, :, None]
        if BITS != 8 and BK < K:
            tile = next_tile
            if BITS == 4:
                pair = next_pair
    if PDL == 1:
        gdc_launch_dependents()
    sums = tl.sum(sums, 0)
    if NORM:
        mean = tl.sum(tl.sum(squares, 2), 0)[None, :] / K
        sums *= _repeat(tl.rsqrt(mean + EPSILON), 1, KNOWN, R)
    return sums


@triton.jit
def _numbers(tile, DTYPE: tl.constexpr, BITS: tl.constexpr, PIECES: tl.constexpr,
             BN: tl.constexpr):  # fmt: skip
    """A tile as one matrix for each piece, (PIECES, BN, columns); of four bits 128 + n."""
    if BITS == 16:
        # Of columns: 8s, 4s, 2s, 1s.
        every = tl.reshape(tile, [BN // 8, PIECES, 8, 4, 2, 2, 2])
        every = tl.reshape(tl.permute(every, (1, 0, 2, 4, 5, 3, 6)), [PIECES, BN, 32])
    elif BITS == 8:
        # Of columns: 16s, 4s, 1s.
        every = tl.reshape(tile.to(DTYPE), [BN // 8, PIECES, 8, 4, 4, 4])
        every = tl.reshape(tl.permute(every, (1, 0, 2, 4, 3, 5)), [PIECES, BN, 64])
    else:
        near = tl.join(_neighbours(tile, 0, DTYPE), _neighbours(tile, 4, DTYPE))
        far = tl.join(_neighbours(tile, 8, DTYPE), _neighbours(tile, 12, DTYPE))
        every = _matrix(near, far, PIECES, BN)
    return every


@triton.jit
def _matrix(near, far, PIECES: tl.constexpr, BN: tl.constexpr):
    """Numbers of four bits, of which words have two by two, as (PIECES, BN, columns)."""
    # Of columns: 2s, 32s, 1s, 8s, 16s.
    every = tl.reshape(tl.join(near, far), [BN // 8, PIECES, 8, 4, 4, 2, 2, 2])
    return tl.reshape(tl.permute(every, (1, 0, 2, 4, 7, 3, 6, 5)), [PIECES, BN, 128])


@triton.jit
def _halves(words):
    """The low and the high 16 bits of every word, as bfloat16."""
    low = (words & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
    high = (words >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return low, high


@triton.jit
def _neighbours(words, SHIFT: tl.constexpr, DTYPE: tl.constexpr):
    """128 + n for two neighbours of every word: (..., 2)."""
    if DTYPE == tl.bfloat16:
        # (words >> SHIFT) & 0x000F000F | 0x43004300, which the compiler makes two instructions of.
        both = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [words >> SHIFT, 0x000F000F, 0x43004300],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
        low, high = _halves(both)
    else:
        low = (((words >> SHIFT) & 15) + 128).to(DTYPE)
        high = (((words >> (SHIFT + 16)) & 15) + 128).to(DTYPE)
    return tl.join(low, high)


@triton.jit
def _ones(words, DTYPE: tl.constexpr):
    """Two for every word, made as ``_neighbours`` makes its, that both lie alike in registers."""
    if DTYPE == tl.bfloat16:
        both = tl.inline_asm_elementwise("mov.b32 $0, 0x3F803F80;", "=r,r", [words],
                                         dtype=tl.int32, is_pure=True, pack=1)  # fmt: skip
        low, high = _halves(both)
    else:
        low = (words * 0 + 1).to(DTYPE)
        high = low
    return tl.join(low, high)


@triton.jit
def _turned(some, BITS: tl.constexpr, PIECES: tl.constexpr, KNOWN: tl.constexpr,
            R: tl.constexpr):  # fmt: skip
    """x (PIECES, KNOWN, columns), its columns as ``_numbers`` has them: (PIECES, columns, R)."""
    COLUMNS: tl.constexpr = 512 // BITS
    if BITS == 16:
        some = tl.permute(tl.reshape(some, [PIECES, KNOWN, 4, 2, 2, 2]), (0, 3, 4, 2, 5, 1))
    elif BITS == 8:
        some = tl.permute(tl.reshape(some, [PIECES, KNOWN, 4, 4, 4]), (0, 3, 2, 4, 1))
    else:
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
