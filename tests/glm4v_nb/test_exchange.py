"""What ranks exchange within a step: three of them in one process, one launch after the other, by
Triton's interpreter. That they wait for each other is tested with processes, in test_parallel.py.
"""

from types import SimpleNamespace

import pytest
import torch

from glm4v_nb.inference import fast
from glm4v_nb.inference.weights import Weight
from glm4v_nb.parallel import RankLost, Ranks

COUNT, ROWS, HIDDEN, COLUMNS, TOKENS = 3, 2, 32, 48, 40  # ranks, and sizes of each
ALONE = {"PDL": 0}


@pytest.fixture
def world(interpreter):
    """The exchanges of all ranks, which wait for nobody; and random numbers."""
    from glm4v_nb.parallel.exchange import Exchange

    torch.manual_seed(0)
    ranks = [Ranks(rank, COUNT, exchanges=False) for rank in range(COUNT)]
    found = [Exchange(each, 1, ROWS, HIDDEN, torch.empty(TOKENS, HIDDEN)) for each in ranks]
    memory = [torch.zeros(each.bytes, dtype=torch.uint8) for each in found]
    for each, own in zip(found, memory, strict=True):
        each.meet(own, [other.data_ptr() for other in memory])
    return found


def launch(kernel, weight, tile, x, gain, *operands, **constants):
    kernel[(-(-weight.shape[0] // tile.rows),)](
        x, gain, weight.numbers, weight.scales, *operands, ROWS=ROWS, R=tile.lanes, EPSILON=1e-6,
        BITS=weight.bits, BN=tile.rows, BK=tile.columns, num_warps=tile.warps,
        **ALONE, **constants,
    )  # fmt: skip


def add_up(exchange, part, residual, number):
    from glm4v_nb.inference.tiles import Tile

    x, weight = part
    y = torch.zeros(ROWS, HIDDEN)
    exchange.lost.zero_()
    exchange.number = number - 1
    exchange.add_up(launch, x, Weight.of(weight), residual, y, Tile(16, 64, 4, 2, 8))
    return y


def test_a_sum_is_that_of_all_ranks_and_the_same_on_each(world):
    residual = torch.randn(ROWS, HIDDEN)
    for number in (1, 2, 3):  # the third goes where the first was
        parts = [(torch.randn(ROWS, COLUMNS), torch.randn(HIDDEN, COLUMNS)) for _ in world]
        for exchange, part in zip(world, parts, strict=True):
            add_up(exchange, part, residual, number)
        # All have sent theirs.
        sums = [add_up(*each, residual, number) for each in zip(world, parts, strict=True)]
        right = residual + sum(x @ weight.T for x, weight in parts)
        torch.testing.assert_close(sums[0], right, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(sums[0], each) for each in sums)
        assert not any(exchange.lost for exchange in world)


def test_a_rank_that_has_sent_nothing_for_this_sum_is_missed(world):
    residual = torch.zeros(ROWS, HIDDEN)
    part = torch.randn(ROWS, COLUMNS), torch.randn(HIDDEN, COLUMNS)
    for exchange in world:
        add_up(exchange, part, residual, 1)
    assert not world[-1].lost  # the others were before it
    for exchange in world[:-1]:
        add_up(exchange, part, residual, 3)
        assert exchange.lost  # what the last one has sent is of sum 1
    add_up(world[-1], part, residual, 3)
    assert not world[-1].lost


def test_what_a_rank_sends_for_the_next_sum_leaves_this_one_in_its_place(world):
    residual = torch.zeros(ROWS, HIDDEN)
    part = torch.randn(ROWS, COLUMNS), torch.randn(HIDDEN, COLUMNS)
    for number in (1, 2):  # the others have all packets of sum 1, and are ahead
        for exchange in world[:-1]:
            add_up(exchange, part, residual, number)
    found = add_up(world[-1], part, residual, 1)
    assert not world[-1].lost
    torch.testing.assert_close(found, COUNT * part[0] @ part[1].T, rtol=1e-5, atol=1e-5)


def test_each_token_has_its_row_of_the_embedding_from_the_rank_that_has_it(world):
    embedding = torch.randn(COUNT, TOKENS, HIDDEN)
    tokens = torch.tensor([3, 2 * TOKENS + 39])
    found = [torch.zeros(ROWS, HIDDEN) for _ in world]
    for _ in range(2):
        for exchange, part, y in zip(world, embedding, found, strict=True):
            exchange.lost.zero_()
            exchange.embed(tokens, part, y, ALONE)
    for exchange, y in zip(world, found, strict=True):
        assert torch.equal(y, embedding.flatten(0, 1)[tokens])
        assert not exchange.lost


@pytest.fixture
def spread(world):
    """The world, when every rank has its part of the logits everywhere; and those logits."""
    from glm4v_nb.inference.tiles import Tile

    head = torch.randn(COUNT * TOKENS, HIDDEN)
    head[TOKENS + 7] = head[TOKENS + 2]  # of the likeliest, in the first row
    x, gain = torch.stack((head[TOKENS + 7], head[3])), torch.ones(HIDDEN)
    for exchange, part in zip(world, head.split(TOKENS), strict=True):
        exchange.spread(launch, x, gain, Weight.of(part.contiguous()), Tile(16, 64, 4, 2, 8))
    return world, x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) @ head.T


def choose(exchange):
    likeliest, state = torch.zeros(ROWS, dtype=torch.long), torch.zeros(4, ROWS, dtype=torch.int32)
    exchange.choose(likeliest, state, ALONE)
    return likeliest.tolist(), state


def test_logits_are_those_of_all_ranks_and_the_first_of_the_likeliest_is_chosen(spread):
    world, right = spread
    for exchange in world:
        torch.testing.assert_close(exchange.logits, right, rtol=1e-5, atol=1e-5)
        choose(exchange)
    for exchange in world:
        exchange.epoch -= exchange.exchanges  # once more, now that all have sent theirs
        exchange.lost.zero_()
        likeliest, state = choose(exchange)
        assert likeliest == [TOKENS + 2, 3]
        assert state.tolist() == [[1, 1], [1, 1], [0, 0], [0, 0]]


def test_where_a_rank_was_lost_the_token_is_none(spread):
    world, _ = spread
    assert choose(world[0])[0] == [-1, -1]
    step = SimpleNamespace(ranks=Ranks(0, COUNT))
    assert fast._present(step, [5, 7]) == [5, 7]
    with pytest.raises(RankLost, match=r"^Rank 0 of 3 does not reach the others \(it waited"):
        fast._present(step, [5, -1])
