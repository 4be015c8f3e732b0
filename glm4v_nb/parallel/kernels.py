"""What ranks exchange within a decode step, in Triton: sums that meet in the products' own kernels.

A program that has its part of a sum writes it into the memory of all other ranks, and waits for
theirs of the same outputs: no kernel stands between two products, and a card waits only for what
it adds. All write before they wait, and cards begin programs in the order of their numbers, so that
none waits for one that has no room to begin.

A number travels as a packet of eight bytes, which are written and read at once: itself as float32,
and a tag that no other packet of the same place has; so there is no flag to wait for, nor an order
of writes to keep (NCCL's protocol LL does it so). Packets of two exchanges lie in two halves in
turn: who writes into a half the next time has all packets of the exchange between, whose senders
have read that half.

A wait ends after so many looks. Then ``lost`` is set, no program waits any more, and the step's
token is -1. ``epoch`` is the first tag of a step, one for each row.
"""

from glm4v_nb.inference.products import gdc_launch_dependents, gdc_wait, weigh
from simgpu.kernels import language as tl
from simgpu.kernels import triton


@triton.jit
def _send(value, tag, peers, at, mask, RANK: tl.constexpr, COUNT: tl.constexpr):
    """Write float32 values as packets to ``at`` in the memory of every other rank."""
    bits = value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    packet = (tag.to(tl.int64) << 32) | bits
    for rank in tl.static_range(COUNT):
        if rank != RANK:
            there = tl.load(peers + rank).to(tl.pointer_type(tl.int64))
            tl.store(there + at, packet, mask=mask)


@triton.jit
def _receive(peers, offset, tag, mask, lost, looks, RANK: tl.constexpr):
    """The values of the packets with this tag at an offset of this rank's memory, once there."""
    at = tl.load(peers + RANK).to(tl.pointer_type(tl.int64)) + offset
    packet = tl.load(at, mask=mask, other=0, volatile=True)
    missing = tl.sum((mask & ((packet >> 32).to(tl.int32) != tag)).to(tl.int32))
    tried = 0
    while (missing > 0) & (tried < looks):
        packet = tl.load(at, mask=mask, other=0, volatile=True)
        missing = tl.sum((mask & ((packet >> 32).to(tl.int32) != tag)).to(tl.int32))
        tried += 1 + looks * tl.load(lost, volatile=True)
    tl.store(lost, 1, mask=missing > 0)
    return packet.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _prefetch(weight, HALF: tl.constexpr, BYTES: tl.constexpr, PIECE: tl.constexpr,
              PIECES: tl.constexpr, THREADS: tl.constexpr):  # fmt: skip
    """Ask for this program's pieces of the first BYTES of each of a weight's two halves, into the
    card's second cache; HALF and PIECE are in bytes, too."""
    lane = tl.arange(0, THREADS)
    index = tl.program_id(0) * PIECES + lane
    offset = index // 2 * PIECE
    known = (lane < PIECES) & (offset + PIECE <= BYTES)
    at = weight.to(tl.pointer_type(tl.int8)) + offset + index % 2 * HALF
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.u32 p, $2, 0;"
        " @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r", [at, tl.where(known, PIECE, 0)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def project_shared(x, gain, weight, scales, residual, y, peers, epoch, lost, looks, exchange, ahead,
                   OUTPUTS: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr,
                   EPSILON: tl.constexpr, BITS: tl.constexpr, RANK: tl.constexpr,
                   COUNT: tl.constexpr, HALF: tl.constexpr, BYTES: tl.constexpr,
                   PIECE: tl.constexpr, PIECES: tl.constexpr, THREADS: tl.constexpr,
                   BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """y (ROWS, OUTPUTS) = the sum over the ranks of W x, plus residual, the same on every rank.

    Meanwhile the card's memory brings the first of the weights ``ahead``.
    """
    begin, row = tl.program_id(0) * BN, tl.arange(0, R)
    outputs = begin + tl.arange(0, BN)
    sums = weigh(x, gain, weight, scales, begin, 0, OUTPUTS, 0, OUTPUTS, K, ROWS, R, False,
                 EPSILON, BITS, BN, BK, PDL)  # fmt: skip
    at = row[None, :] * OUTPUTS + outputs[:, None]
    mask = (row < ROWS)[None, :] & (outputs < OUTPUTS)[:, None]
    tag = tl.load(epoch) + exchange
    half = exchange % 2 * (COUNT * ROWS * OUTPUTS)
    _send(sums, tag, peers, half + RANK * (ROWS * OUTPUTS) + at, mask, RANK, COUNT)
    if BYTES > 0:
        _prefetch(ahead, HALF, BYTES, PIECE, PIECES, THREADS)
    before = tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros_like(sums)
    for rank in tl.static_range(COUNT):  # in their order, so that all ranks round alike
        if rank == RANK:
            total += sums
        else:
            there = half + rank * (ROWS * OUTPUTS) + at
            total += _receive(peers, there, tag, mask, lost, looks, RANK)
    tl.store(y + at, before + total, mask=mask)


@triton.jit
def embed_shared(tokens, embedding, y, peers, epoch, lost, looks, exchange,
                 TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, RANK: tl.constexpr,
                 COUNT: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr,
                 PDL: tl.constexpr):  # fmt: skip
    """y (ROWS, OUTPUTS): the tokens' rows, each from the rank that has it.

    A rank has TOKENS rows of the embedding.
    """
    row, column = tl.program_id(0), tl.program_id(1) * B + tl.arange(0, B)
    if PDL:
        gdc_launch_dependents()
    mask = column < OUTPUTS
    token = tl.maximum(tl.load(tokens + row), 0)  # -1 after a rank was lost
    owner = (token // TOKENS).to(tl.int32)
    tag = tl.load(epoch + row) + exchange
    half = exchange % 2 * (COUNT * ROWS * OUTPUTS)
    at = half + (owner * ROWS + row) * OUTPUTS + column
    if owner == RANK:
        place = (token - owner * TOKENS) * OUTPUTS + column
        value = tl.load(embedding + place, mask=mask, other=0.0).to(tl.float32)
        _send(value, tag, peers, at, mask, RANK, COUNT)
        tl.store(y + row * OUTPUTS + column, value, mask=mask)
    else:
        value = _receive(peers, at, tag, mask, lost, looks, RANK)
        tl.store(y + row * OUTPUTS + column, value, mask=mask)


@triton.jit
def project_spread(x, gain, weight, scales, peers, logits, OUTPUTS: tl.constexpr, K: tl.constexpr,
                   ROWS: tl.constexpr, R: tl.constexpr, EPSILON: tl.constexpr, BITS: tl.constexpr,
                   RANK: tl.constexpr, COUNT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                   PDL: tl.constexpr):  # fmt: skip
    """This rank's OUTPUTS of the logits (ROWS, COUNT OUTPUTS), in the memory of every rank."""
    begin, row = tl.program_id(0) * BN, tl.arange(0, R)
    outputs = begin + tl.arange(0, BN)
    sums = weigh(x, gain, weight, scales, begin, 0, OUTPUTS, 0, OUTPUTS, K, ROWS, R, True, EPSILON,
                 BITS, BN, BK, PDL)  # fmt: skip
    at = row[None, :] * (COUNT * OUTPUTS) + RANK * OUTPUTS + outputs[:, None]
    mask = (row < ROWS)[None, :] & (outputs < OUTPUTS)[:, None]
    for rank in tl.static_range(COUNT):
        there = tl.load(peers + rank).to(tl.pointer_type(logits.dtype.element_ty))
        tl.store(there + at, sums, mask=mask)


@triton.jit
def choose(logits, likeliest, peers, epoch, lost, looks, state, exchange,
           OUTPUTS: tl.constexpr, EXCHANGES: tl.constexpr, RANK: tl.constexpr, COUNT: tl.constexpr,
           ROWS: tl.constexpr, B: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """The likeliest token of each row, the first of several, or -1 where a rank was lost.

    Each rank looks at its own part of the logits; its two packets say that all of them are there.
    Then the row is a position further, and the step's EXCHANGES tags are used.
    """
    row = tl.program_id(0)
    if PDL:
        gdc_wait()
    lane = tl.arange(0, B)
    best, where = tl.full([B], float("-inf"), tl.float32), tl.zeros([B], tl.int32)
    own = logits + row * (COUNT * OUTPUTS) + RANK * OUTPUTS
    for start in range(0, OUTPUTS, B):
        value = tl.load(own + start + lane, mask=start + lane < OUTPUTS, other=float("-inf"))
        value = value.to(tl.float32)
        where = tl.where(value > best, start + lane, where)
        best = tl.maximum(best, value)
    most = tl.max(best, 0)
    first = tl.min(tl.where(best == most, where, OUTPUTS), 0) + RANK * OUTPUTS
    # What this rank has written of the logits is there before the packets are.
    tl.atomic_add(lost, 0, sem="acq_rel", scope="sys")
    tag = tl.load(epoch + row) + exchange
    two = tl.arange(0, 2)
    both = tl.where(two == 0, most, first.to(tl.float32, bitcast=True))
    _send(both, tag, peers, (RANK * ROWS + row) * 2 + two, two < 2, RANK, COUNT)
    most = tl.full([], float("-inf"), tl.float32)
    token = tl.full([], 0, tl.int32)  # for logits that are no numbers
    for rank in tl.static_range(COUNT):
        found = both
        if rank != RANK:
            at = (rank * ROWS + row) * 2 + two
            found = _receive(peers, at, tag, two < 2, lost, looks, RANK)
        value = tl.sum(tl.where(two == 0, found, 0.0), 0)
        index = tl.sum(tl.where(two == 1, found.to(tl.int32, bitcast=True), 0), 0)
        token = tl.where(value > most, index, token)
        most = tl.maximum(value, most)
    tl.atomic_add(lost, 0, sem="acq_rel", scope="sys")
    token = tl.where(tl.load(lost, volatile=True) > 0, -1, token)
    tl.store(likeliest + row, token.to(tl.int64))
    tl.store(state + row, tl.load(state + row) + 1)
    tl.store(state + ROWS + row, tl.load(state + ROWS + row) + 1)
    tl.store(epoch + row, tl.load(epoch + row) + EXCHANGES)
