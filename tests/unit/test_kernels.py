"""What CUDA's kernels take while they run; the figures are those of traces on an H100 with torch 2.11, 2026-11-25."""

import math

import pytest
import torch
from rig_fixtures import MIB
from torch.utils.flop_counter import FlopCounterMode

from glm4v_nb.memory import flop_counter
from glm4v_nb.rig import Rig, device, find_card
from glm4v_nb.rig.addresses import FIRST_REGION, LARGE, REGION, TOP, AddressSpace
from glm4v_nb.rig.kernels import scratch_bytes

H100 = find_card("H100")


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        # Gradients of a norm's weight and of the biases of keys and values, for two images and 32 tokens.
        ((2, 1634, 4096), [109_051_904, 128]),
        ((2, 1634, 256), [6_815_744, 8]),
        # 256 positions are few enough for one block of threads.
        ((1, 256, 4096), []),
    ],
)
def test_sums_over_positions_take_room_for_partial_sums(shape, found):
    assert scratch_bytes("aten::sum", (meta(*shape), [0, 1]), H100) == found


def test_sums_along_rows_and_over_strided_tensors():
    assert scratch_bytes("aten::sum", (meta(1634, 4096), [1]), H100) == []
    partial, counters = scratch_bytes("aten::sum", (meta(4096, 4096, dtype=torch.float32),), H100)
    assert partial % 4 == 0 and counters == 4, "one number, summed by many blocks"
    assert scratch_bytes("aten::sum", (meta(64, 4096).T, [0]), H100) == []
    assert scratch_bytes("aten::sum", (meta(0, 4), [0]), H100) == []
    assert scratch_bytes("aten::mm", (meta(4, 4), meta(4, 4)), H100) == []


@pytest.mark.parametrize(("batch", "positions", "found"), [(1, 256, 8_421_632), (2, 1634, 107_504_384)])
def test_attention_backward_of_grouped_heads(batch, positions, found):
    query, key = meta(batch, 32, positions, 128), meta(batch, 2, positions, 128)
    (size,) = scratch_bytes(
        "aten::_scaled_dot_product_cudnn_attention_backward", (query, query, key, key), H100
    )
    assert size == found


def test_embedding_backward_of_many_tokens():
    arguments = (meta(2, 1634, 4096), torch.empty((2, 1634), dtype=torch.int64, device="meta"), 151_552)
    sizes = scratch_bytes("aten::embedding_dense_backward", arguments, H100)
    assert sizes[-1] == 58_884_096
    few = (meta(1, 256, 4096), torch.empty((1, 256), dtype=torch.int64, device="meta"), 151_552)
    assert scratch_bytes("aten::embedding_dense_backward", few, H100) == []


def test_scratch_counts_in_the_peak_and_is_gone_afterwards():
    rig = Rig.simulated("H100")
    with rig:
        ones = torch.empty(3268, 4096, dtype=torch.bfloat16, device="cuda")
        with rig.stage("sum") as stage:
            total = ones.sum(0)
    (memory,) = stage.memory
    assert total.shape == (4096,)
    assert memory.peak_allocated_bytes == memory.allocated_bytes + 109_051_904 + 512


def backward_peak(exclusive: bool) -> float:
    """MiB beyond what is there before a backward pass in which two gradients of 64 MiB are added."""
    rig = Rig.simulated("H100")
    with rig:
        leaf = torch.empty(2**24, device="cuda", requires_grad=True)
        early = leaf * 2
        middle = leaf * 3 if exclusive else early * 1
        late = middle * 5
        # In the shared case the gradient of the sum is that of two tensors, one of which still waits for its turn.
        total = (middle * 1.5 if exclusive else middle + early) * 7
        late_and_total = late.sum() + total.sum()
        before = rig.memory()[0].allocated_bytes
        with rig.stage("backward") as stage:
            late_and_total.backward()
    return (stage.memory[0].peak_allocated_bytes - before) / MIB


def test_gradients_are_added_in_place_as_the_engine_does_on_cuda(monkeypatch):
    in_place = backward_peak(exclusive=True)
    monkeypatch.setattr(device, "_added_in_place", lambda *arguments, **options: False)
    assert backward_peak(exclusive=True) == in_place + 64


def test_a_gradient_somebody_waits_for_is_not_added_to(monkeypatch):
    answers = []
    original = device._added_in_place

    def noted(*arguments, **options):
        answer = original(*arguments, **options)
        if torch._C._current_graph_task_id() >= 0:
            answers.append(answer)
        return answer

    monkeypatch.setattr(device, "_added_in_place", noted)
    backward_peak(exclusive=False)
    assert answers == [False, True]


def test_the_backward_pass_of_silu_is_one_kernel():
    rig = Rig.simulated("H100")
    with rig:
        leaf = torch.empty(2**24, device="cuda", requires_grad=True)
        output = torch.nn.functional.silu(leaf)
        with rig.stage("backward") as stage:
            output.backward(torch.empty_like(output))
    assert stage.memory[0].peak_allocated_bytes == 4 * leaf.nbytes


def test_a_segment_goes_into_the_smallest_hole_the_lowest_of_equals_or_below():
    space = AddressSpace()
    assert space.take(20 * MIB) == TOP
    first, second = (space.take(214 * MIB) for _ in range(2))
    assert first == TOP - 224 * MIB, "a region of whole 32 MiB below the first"
    assert second == first - 224 * MIB
    assert space.take(2 * MIB) == second + 214 * MIB, "both regions leave 10 MiB"
    assert space.take(20 * MIB) == TOP + 20 * MIB
    space.give_back(first)
    assert space.take(214 * MIB) == first, "an unmapped region's addresses are the highest free ones"


def test_segments_never_overlap_and_the_first_region_stays():
    space, taken = AddressSpace(), {}
    sizes = [2, 20, 32, 86, 108, 148, 214, 1184]
    for step in range(600):
        size = sizes[step * 7 % len(sizes)] * MIB
        if step % 3 == 2:
            address = sorted(taken)[step * 5 % len(taken)]
            del taken[address]
            space.give_back(address)
        address = space.take(size)
        for other, length in taken.items():
            assert address + size <= other or other + length <= address
        taken[address] = size
    for address in taken:
        space.give_back(address)
    assert space._holes == [(FIRST_REGION, TOP)]
    assert LARGE % REGION == 0


def test_flops_are_those_of_torchs_own_counter():
    def count(counter):
        with Rig.simulated("H100"), counter:
            query = torch.empty(1, 4, 64, 32, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            output = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
            output.sum().backward()
        return counter.get_total_flops()

    assert count(flop_counter()) == count(FlopCounterMode(display=False)) == 14 * math.prod((4, 64, 64, 32))
