"""What CUDA's kernels take while they run; figures of traces on H100 and H200, torch 2.11,
2026-11-25 and -26."""

import copy
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rig_fixtures import MIB
from torch.utils.flop_counter import FlopCounterMode

from glm4v_nb.training import flop_counter
from simgpu import Rig
from simgpu.addresses import FIRST_REGION, SET_OFF, TOP, AddressSpace
from simgpu.engine import IN_PLACE
from simgpu.operators import DECODE_KERNELS, DECODE_SIZES, LONG_DECODE


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
    """MiB beyond what is there before a backward pass in which two gradients of 64 MiB are
    added."""
    rig = Rig.simulated("H100")
    with rig:
        leaf = torch.empty(2**24, device="cuda", requires_grad=True)
        early = leaf * 2
        middle = leaf * 3 if exclusive else early * 1
        late = middle * 5
        # In the shared case the gradient of the sum is that of two tensors, one of which still
        # waits for its turn.
        total = (middle * 1.5 if exclusive else middle + early) * 7
        late_and_total = late.sum() + total.sum()
        before = rig.memory()[0].allocated_bytes
        with rig.stage("backward") as stage:
            late_and_total.backward()
    return (stage.memory[0].peak_allocated_bytes - before) / MIB


def test_gradients_are_added_in_place_as_the_engine_does_on_cuda(monkeypatch):
    in_place = backward_peak(exclusive=True)
    monkeypatch.setitem(IN_PLACE, torch.ops.aten.add.Tensor, lambda *arguments: False)
    assert backward_peak(exclusive=True) == in_place + 64


def test_a_gradient_somebody_waits_for_is_not_added_to(monkeypatch):
    answers = []
    original = IN_PLACE[torch.ops.aten.add.Tensor]

    def noted(*arguments):
        answer = original(*arguments)
        if torch._C._current_graph_task_id() >= 0:
            answers.append(answer)
        return answer

    monkeypatch.setitem(IN_PLACE, torch.ops.aten.add.Tensor, noted)
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


def test_a_segment_goes_into_the_smallest_hole_of_the_newest_region_that_has_one_or_below_all():
    space = AddressSpace()
    assert space.take(2 * MIB) == TOP + FIRST_REGION - SET_OFF
    assert space.take(20 * MIB) == TOP
    first, second = (space.take(414 * MIB) for _ in range(2))
    assert first == TOP - 416 * MIB, "a region of whole 32 MiB below the first"
    assert second == first - 416 * MIB
    assert space.take(2 * MIB) == second + 414 * MIB, "the newest region's"
    assert space.take(2 * MIB) == first + 414 * MIB
    space.give_back(second)
    assert space.take(100 * MIB) == second, "a region stays while anything is in it"
    space.give_back(first + 414 * MIB)
    space.give_back(first)
    assert space.take(394 * MIB) == TOP + 20 * MIB, "an empty region is unmapped"
    assert space.take(416 * MIB) == first, "and its addresses are the highest free ones"


def test_segments_of_a_real_process_get_the_places_the_driver_gave_them():
    """Regions lie where the driver had room; within and among them every place has to be the
    same."""
    measured = json.loads(
        Path(__file__).with_name("segments_h100.json").read_text(encoding="utf-8")
    )
    space = AddressSpace()
    # Of each region, how far from its address here it really is.
    places = {TOP: measured["first_region"] * MIB - TOP}
    taken, right = {}, 0
    for action, address, size in measured["events"]:
        address, size = address * MIB, size * MIB
        if action == "give back":
            space.give_back(taken.pop(address))
            continue
        if action == "region":
            start = TOP - address * MIB  # far from all others
            space._regions.insert(
                0, (start, size, [(measured["holes"][str(address // MIB)] * MIB, start)])
            )
            places[start] = address - start
            continue
        before = {start for start, *_ in space._regions}
        here = space.take(size)
        if action == "driver":
            continue
        start = next(start for start, whole, _ in space._regions if start <= here < start + whole)
        if start in before:
            assert here + places[start] == address, (right, address // MIB, size // MIB)
            right += 1
        else:
            places[start] = address - here
        taken[address] = here
    assert right == 201


def test_segments_never_overlap_those_of_other_cards_neither_and_the_first_regions_stay():
    space, taken = AddressSpace(cards=2), {}
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
    assert [(start, whole) for start, whole, _ in space._regions] == [
        (TOP, FIRST_REGION),
        (TOP + FIRST_REGION, FIRST_REGION),
    ]


def test_kernels_take_addresses_among_the_segments_and_memory_of_the_card():
    rig = Rig.simulated("H100")
    weight = 2**20

    def decode():
        torch.empty(weight, device="cuda")

    with rig:
        free = [rig.memory()[0].free_bytes]
        for steps in (LONG_DECODE - 1, LONG_DECODE, LONG_DECODE):
            rig.repeat(decode, steps)
            free.append(rig.memory()[0].free_bytes + rig.memory()[0].reserved_bytes)
        assert [early - late for early, late in pairwise(free)] == [0, sum(DECODE_KERNELS), 0], (
            "once for a size"
        )
        for size in range(2, 9):
            weight = size * 2**20
            rig.repeat(decode, LONG_DECODE)
    grown = free[0] - rig.memory()[0].free_bytes - rig.memory()[0].reserved_bytes
    assert grown == DECODE_SIZES * sum(DECODE_KERNELS), "for no more sizes than were measured"


def test_the_gradients_of_a_convolution_are_made_as_cudnn_makes_them():
    rig = Rig.simulated("H100")
    workspace = 205_979_648  # cuDNN's for the tower's first convolution, traced
    with rig:
        convolution = torch.nn.Conv2d(3, 1792, 14, 14, dtype=torch.bfloat16, device="cuda")
        pixels = torch.empty(1, 3, 1120, 1120, dtype=torch.bfloat16, device="cuda")
        output = convolution(pixels)
        gradient = torch.empty_like(output)
        before = rig.memory()[0].allocated_bytes
        with rig.stage("backward") as stage:
            output.backward(gradient)
    kept = convolution.weight.nbytes
    assert stage.memory[0].peak_allocated_bytes == pytest.approx(before + kept + workspace, abs=MIB)
    assert convolution.weight.grad.shape == convolution.weight.shape


def test_the_gradient_of_an_index_is_put_into_new_zeros_in_place_and_a_program_s_own_is_not():
    rig = Rig.simulated("H100")

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(context, tensor):
            return tensor * 2

        @staticmethod
        def backward(context, gradient):
            changed = torch.index_put(gradient, (first,), gradient[:4])
            assert changed is not gradient
            return changed

    with rig:
        leaf = torch.empty(2**20, 8, device="cuda", requires_grad=True)
        rows, first = (torch.zeros(count, dtype=torch.long, device="cuda") for count in (16, 4))
        output = leaf[rows]
        before = rig.memory()[0].allocated_bytes
        with rig.stage("backward") as stage:
            output.backward(torch.empty_like(output))
        assert stage.memory[0].peak_allocated_bytes - before == pytest.approx(leaf.nbytes, abs=MIB)
        leaf.grad = None
        output = Own.apply(leaf)
        before = rig.memory()[0].allocated_bytes
        with rig.stage("own") as stage:
            output.backward(torch.empty_like(output))
        assert stage.memory[0].peak_allocated_bytes - before >= 2 * leaf.nbytes


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (torch.nn.Conv1d(4, 8, 3), (2, 4, 16)),
        (torch.nn.Conv2d(4, 8, 3, bias=False), (2, 4, 16, 16)),
        (torch.nn.Conv2d(4, 8, 3, groups=2), (2, 4, 16, 16)),
        (torch.nn.ConvTranspose2d(4, 8, 3), (2, 4, 16, 16)),
        (torch.nn.Conv3d(4, 8, 3), (2, 4, 16, 16, 16)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_convolutions_have_gradients_of_the_right_shapes_too(module, shape):
    with Rig.simulated("H100"):
        module = copy.deepcopy(module).to("cuda")
        pixels = torch.empty(shape, device="cuda", requires_grad=True)
        module(pixels).sum().backward()
    assert pixels.grad.shape == shape
    assert all(weight.grad.shape == weight.shape for weight in module.parameters())


def test_flops_are_those_of_torchs_own_counter():
    def count(counter):
        with Rig.simulated("H100"), counter:
            query = torch.empty(
                1, 4, 64, 32, dtype=torch.bfloat16, device="cuda", requires_grad=True
            )
            output = torch.nn.functional.scaled_dot_product_attention(
                query, query, query, is_causal=True
            )
            output.sum().backward()
        return counter.get_total_flops()

    assert (
        count(flop_counter())
        == count(FlopCounterMode(display=False))
        == 14 * math.prod((4, 64, 64, 32))
    )


def test_a_bias_is_added_in_place_behind_an_input_in_pieces():
    rig = Rig.simulated("L4")
    with rig, torch.no_grad():
        layer = torch.nn.Linear(256, 4096, device="cuda")
        inputs = torch.empty(600, 8, 256, device="cuda")
        for each in (inputs, inputs.transpose(0, 1)):
            layer(each)  # workspaces
            with rig.stage("linear"):
                kept = layer(each)
            del kept
    in_one_piece, in_pieces = (
        stage.memory[0].peak_allocated_bytes - stage.memory[0].allocated_bytes
        for stage in rig.stages
    )
    assert in_one_piece == 0
    assert in_pieces == inputs.nbytes, "a copy of the input in one piece, and no second result"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_grouped_products_pad_their_rows_to_16_bytes_in_any_type(dtype):
    with Rig("H100"):
        tokens = torch.empty(64, 128, dtype=dtype, device="cuda", requires_grad=True)
        experts = torch.empty(4, 128, 101, dtype=dtype, device="cuda", requires_grad=True)
        ends = torch.tensor([16, 32, 48, 64], dtype=torch.int32, device="cuda")
        product = torch._grouped_mm(tokens, experts, ends)
        assert product.shape == (64, 101) and product.stride() == (104, 1)
        product.sum().backward()
        assert (tokens.grad.shape, experts.grad.shape) == (tokens.shape, experts.shape)
