"""Small tensors on simulated cards keep their numbers, and nothing else has any."""

import pytest
import torch

from simgpu import Rig
from simgpu.numbers import OTHERS, numbers_of


@pytest.fixture
def rig():
    with Rig.simulated("L4", 2) as rig:
        yield rig


def of(*values, **options):
    return torch.tensor(values, device="cuda", **options)


FOLLOWING = {
    "arithmetic": (lambda: of(1, 2, 3) * 2 + torch.arange(3, device="cuda"), [2, 5, 8]),
    "a comparison": (lambda: of(1, 2, 3) > 1, [False, True, True]),
    "a view": (lambda: of(1, 2, 3, 4).view(2, 2)[1].flip(0), [4, 3]),
    "running sums": (lambda: of(1, 2, 3).cumsum(0), [1, 3, 6]),
    "a mask": (lambda: of(1, 2, 3)[of(True, False, True)], [1, 3]),
    "places": (lambda: of(0, 5, 0, 7).nonzero(), [[1], [3]]),
    "repeats": (lambda: torch.repeat_interleave(of(1, 2), of(2, 3)), [1, 1, 2, 2, 2]),
    "different ones": (lambda: of(3, 1, 3).unique(), [1, 3]),
    "a sort": (lambda: of(3, 1, 2).sort().values, [1, 2, 3]),
    "the other card": (lambda: of(1, 2, 3).to("cuda:1"), [1, 2, 3]),
    "the CPU": (lambda: of(1, 2, 3).cpu(), [1, 2, 3]),
    "another type": (lambda: of(1, 2, 3).float() / 2, [0.5, 1.0, 1.5]),
    "a concatenation": (lambda: torch.cat([of(1), of(2, 3)]), [1, 2, 3]),
    "writing in place": (lambda: of(1, 2, 3).mul_(2).add_(1), [3, 5, 7]),
    "writing at an index": (lambda: of(0, 0, 0).index_fill_(0, of(1), 9), [0, 9, 0]),
    "several results": (lambda: torch.stack(of(3, 1, 2).topk(2)), [[3, 2], [0, 2]]),
}


@pytest.mark.parametrize(("make", "expected"), FOLLOWING.values(), ids=FOLLOWING.keys())
def test_what_follows_from_small_tensors_is_computed(rig, make, expected):
    tensor = make()
    assert tensor.tolist() == expected
    assert tensor.shape == numbers_of(tensor).shape


def test_a_view_sees_what_is_written_through_another(rig):
    whole = torch.zeros(4, dtype=torch.long, device="cuda")
    part = whole[1:3]
    part.fill_(5)
    assert whole.tolist() == [0, 5, 5, 0]
    part.copy_(torch.randint(0, 9, (2,)).cuda() * 0 + 3)
    assert whole.tolist() == [0, 3, 3, 0]


def test_what_is_unknown_makes_unknown_whatever_it_is_written_into(rig):
    known, unknown = of(1.0, 2.0), torch.randn(2, device="cuda")
    view = known[:1]
    known.add_(unknown)
    assert numbers_of(known) is None
    assert numbers_of(view) is None
    assert numbers_of(of(1.0, 2.0) + unknown) is None
    known.zero_()
    assert known.tolist() == [0, 0]


def test_weights_and_large_tensors_have_no_numbers(rig):
    assert numbers_of(torch.nn.Linear(2, 2).cuda().weight) is None
    assert numbers_of(torch.zeros(OTHERS + 1, device="cuda")) is None


def test_a_mask_of_known_numbers_takes_places_of_an_unknown_tensor(rig):
    found = torch.randn(3, 4, device="cuda")[of(True, False, True)]
    assert found.shape == (2, 4)
    with pytest.raises(RuntimeError, match="tensors on simulated cards have none"):
        found[found > 0]


def test_a_product_has_no_numbers_even_of_zeros():
    with Rig.simulated("L4"):
        layer = torch.nn.Linear(4, 4).cuda()
        layer.weight.register_hook(lambda gradient: print(gradient.norm().item()))
        with pytest.raises(RuntimeError, match="needs the numbers"):
            layer(torch.zeros(2, 4, device="cuda")).sum().backward()
