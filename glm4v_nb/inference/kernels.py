"""One decode step of the decoder in Triton: six kernels a layer, every weight read exactly once.

A step reads every weight once and does two operations with it, so the memory's bandwidth is its
limit, and what counts is that weights stream without a pause. Hence few kernels, with all that is
small (norm, bias, rotation, cache, SiLU, residual) inside those that stream weights, and weights
that are asked for before the kernel in front has ended (programmatic dependent launch, where the
card has it). The norm can be inside since it commutes with the product: with r = 1 / rms(x),
W (r x g) = r (W (x g)).

Shapes: a step has ``ROWS`` rows, one token each: of a batch, or of one sequence to verify. Numbers
in capitals are known when a kernel is compiled. Sums are in float32. ``R`` is 1 where products are
plain sums, of one row, or else the 8 rows of tensor cores; see ``products``.
``BN`` weight rows and ``BK`` columns are a tile. ``PDL`` is 0 where kernels follow each other; else
the next may come before this one's end, and waits for it: with 1 as a product has read its weights,
with 2 as it begins, so that the next takes what room there is.
"""

from glm4v_nb.inference.products import gdc_launch_dependents, gdc_wait, weigh
from simgpu.kernels import language as tl
from simgpu.kernels import triton


@triton.jit
def _pairs(sums, RUN: tl.constexpr, BN: tl.constexpr, R: tl.constexpr):
    """The even runs and the odd runs of rows of (BN, R), each (BN / 2, R)."""
    sums = tl.permute(tl.reshape(sums, [BN // (2 * RUN), 2, RUN, R]), (0, 2, 3, 1))
    return tl.split(tl.reshape(sums, [BN // 2, R, 2]))


@triton.jit
def project(x, gain, weight, scales, residual, y, OUTPUTS: tl.constexpr, K: tl.constexpr,
            ROWS: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
            EPSILON: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    """y (ROWS, OUTPUTS) = W x, of the normalised x with NORM, plus residual with RESIDUAL."""
    begin, row = tl.program_id(0) * BN, tl.arange(0, R)
    outputs = begin + tl.arange(0, BN)
    sums = weigh(x, gain, weight, scales, begin, 0, OUTPUTS, 0, OUTPUTS, K, ROWS, R, NORM, EPSILON,
                 BITS, BN, BK, PDL)  # fmt: skip
    at = row[None, :] * OUTPUTS + outputs[:, None]
    mask = (row < ROWS)[None, :] & (outputs < OUTPUTS)[:, None]
    if RESIDUAL:
        sums += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, sums, mask=mask)


@triton.jit
def project_gated(x, gain, weight, scales, y, OUTPUTS: tl.constexpr, K: tl.constexpr,
                  ROWS: tl.constexpr, R: tl.constexpr, EPSILON: tl.constexpr, BITS: tl.constexpr,
                  BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """y (ROWS, OUTPUTS) = silu(gate) up of the normalised x; weight holds the rows of all gates,
    then of all ups. A tile takes both rows of an output, so that they meet in one program."""
    half = tl.program_id(0) * (BN // 2)
    outputs, row = half + tl.arange(0, BN // 2), tl.arange(0, R)
    # Those past the last output read another output's weights, and are not stored.
    sums = weigh(x, gain, weight, scales, half, 0, 2 * OUTPUTS, OUTPUTS, 2 * OUTPUTS, K, ROWS, R,
                 True, EPSILON, BITS, BN, BK, PDL)  # fmt: skip
    RUN: tl.constexpr = 1 if R == 1 else 8
    gate, up = _pairs(sums, RUN, BN, R)
    mask = (row < ROWS)[None, :] & (outputs < OUTPUTS)[:, None]
    tl.store(y + row[None, :] * OUTPUTS + outputs[:, None], gate * tl.sigmoid(gate) * up, mask=mask)


@triton.jit
def project_heads(x, gain, weight, scales, bias, cosines, sines, positions, slots, sequences,
                  queries, keys, values, capacity, HEADS: tl.constexpr, GROUPS: tl.constexpr,
                  D: tl.constexpr, ROTARY: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
                  R: tl.constexpr, EPSILON: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr,
                  BK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Queries, keys and values of the normalised x, with bias, the first two turned; keys and
    values go straight into the cache.

    queries (ROWS, HEADS, D); keys and values (sequences, GROUPS, capacity, D); cosines and sines
    (positions, ROTARY / 2), for pairs of neighbours; for each row its position, the slot of the
    cache it takes and its sequence.
    """
    first = tl.program_id(0) * BN
    OUTPUTS: tl.constexpr = (HEADS + 2 * GROUPS) * D
    outputs, row = first + tl.arange(0, BN), tl.arange(0, R)
    # Queries, keys and values are the weight's parts.
    KEYS: tl.constexpr = HEADS * D
    VALUES: tl.constexpr = (HEADS + GROUPS) * D
    part = tl.where(outputs < KEYS, 0, tl.where(outputs < VALUES, KEYS, VALUES))
    count = tl.where(outputs < KEYS, KEYS, GROUPS * D)
    sums = weigh(x, gain, weight, scales, first, part, count, 0, OUTPUTS, K, ROWS, R, True,
                 EPSILON, BITS, BN, BK, PDL)  # fmt: skip
    sums += tl.load(bias + outputs, mask=outputs < OUTPUTS, other=0.0).to(tl.float32)[:, None]
    even, odd = _pairs(sums, 1, BN, R)
    output = first + 2 * tl.arange(0, BN // 2)[:, None]
    known = (row < ROWS)[None, :] & (output < OUTPUTS)
    position = tl.load(positions + row, mask=row < ROWS, other=0)[None, :]
    turned = known & (output % D < ROTARY) & (output < (HEADS + GROUPS) * D)
    angle = position * (ROTARY // 2) + (output % D) // 2
    cosine = tl.load(cosines + angle, mask=turned, other=1.0)
    sine = tl.load(sines + angle, mask=turned, other=0.0)
    even, odd = even * cosine - odd * sine, odd * cosine + even * sine
    query = queries + row[None, :] * (HEADS * D) + output
    mask = known & (output < HEADS * D)
    tl.store(query, even, mask=mask)
    tl.store(query + 1, odd, mask=mask)
    slot = tl.load(slots + row, mask=row < ROWS, other=0)[None, :]
    sequence = tl.load(sequences + row, mask=row < ROWS, other=0)[None, :]
    beyond = output - HEADS * D
    group = (sequence * GROUPS + beyond // D % GROUPS).to(tl.int64)
    cached = (group * capacity + slot) * D + output % D
    mask = known & (beyond >= 0) & (beyond < GROUPS * D)
    tl.store(keys + cached, even, mask=mask)
    tl.store(keys + cached + 1, odd, mask=mask)
    mask = known & (beyond >= GROUPS * D)
    tl.store(values + cached, even, mask=mask)
    tl.store(values + cached + 1, odd, mask=mask)


@triton.jit
def attend(queries, keys, values, starts, slots, sequences, parts, maxima, totals, capacity,
           SCALE: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, H: tl.constexpr,
           D: tl.constexpr, SPLITS: tl.constexpr, BT: tl.constexpr, ALONE: tl.constexpr,
           PDL: tl.constexpr):  # fmt: skip
    """A row's attention over one split of its context, for all query heads of one group of keys.

    A row sees its sequence's cache from starts to slots, both included. H is the heads of a group
    (HEADS / GROUPS), rounded up to 16 for tensor cores. parts (ROWS, HEADS, SPLITS, D) are sums of
    values weighted by exp(score - maximum); maxima and totals (ROWS, HEADS, SPLITS) belong to them.
    """
    row, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if PDL == 2:
        gdc_launch_dependents()
    start, slot = tl.load(starts + row), tl.load(slots + row)
    length = tl.cdiv(tl.cdiv(slot + 1 - start, SPLITS), BT) * BT
    start += split * length
    end = tl.minimum(start + length, slot + 1)
    head, d, t = tl.arange(0, H), tl.arange(0, D), tl.arange(0, BT)
    EACH: tl.constexpr = HEADS // GROUPS
    at = row * HEADS + group * EACH + head
    known = (head < EACH)[:, None]
    cached = (tl.load(sequences + row) * GROUPS + group).to(tl.int64) * capacity * D
    place = cached + (start + t)[:, None] * D + d[None, :]
    # Keys and values are asked for one turn ahead; the first, but for the row's own, before the
    # kernel in front has ended, which writes that. Rows of one sequence see each other's own, too:
    # none is ALONE.
    if PDL and not ALONE:
        gdc_wait()
    last = slot if ALONE else end
    there = ((start + t < end) & (start + t < last))[:, None]
    key = tl.load(keys + place, mask=there, other=0.0)
    value = tl.load(values + place, mask=there, other=0.0)
    if PDL and ALONE:
        gdc_wait()
    if PDL == 1:
        gdc_launch_dependents()
    query = tl.load(queries + at[:, None] * D + d[None, :], mask=known, other=0.0)
    if ALONE:
        own = ((start + t < end) & (start + t == slot))[:, None]
        key = tl.load(keys + place, mask=own, other=key)
        value = tl.load(values + place, mask=own, other=value)
    maximum, total = tl.full([H], -1e30, tl.float32), tl.zeros([H], tl.float32)
    sums = tl.zeros([H, D], tl.float32)
    for begin in range(start, end, BT):
        place += BT * D
        there = (begin + BT + t < end)[:, None]
        next_key = tl.load(keys + place, mask=there, other=0.0)
        next_value = tl.load(values + place, mask=there, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * SCALE
        score = tl.where((begin + t < end)[None, :], score, -1e30)
        higher = tl.maximum(maximum, tl.max(score, 1))
        weight, rescale = tl.exp(score - higher[:, None]), tl.exp(maximum - higher)
        total = total * rescale + tl.sum(weight, 1)
        sums = sums * rescale[:, None]
        sums = tl.dot(weight.to(value.dtype), value, sums, input_precision="ieee")
        maximum, key, value = higher, next_key, next_value
    at = at * SPLITS + split
    tl.store(parts + at[:, None] * D + d[None, :], sums, mask=known)
    tl.store(maxima + at, maximum, mask=head < EACH)
    tl.store(totals + at, total, mask=head < EACH)


@triton.jit
def combine(parts, maxima, totals, y, D: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr):
    """y (ROWS HEADS, D): the splits of one row and head together."""
    at, split, d = tl.program_id(0), tl.arange(0, SPLITS), tl.arange(0, D)
    if PDL == 2:
        gdc_launch_dependents()
    if PDL:
        gdc_wait()
    if PDL == 1:
        gdc_launch_dependents()
    maximum = tl.load(maxima + at * SPLITS + split)
    share = tl.exp(maximum - tl.max(maximum, 0))
    total = tl.sum(tl.load(totals + at * SPLITS + split) * share, 0)
    sums = tl.load(parts + (at * SPLITS + split[:, None]) * D + d[None, :])
    tl.store(y + at * D + d, tl.sum(sums * share[:, None], 0) / total)
