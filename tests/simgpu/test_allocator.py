"""Bytes on one simulated card, against the constants and the text of PyTorch's CUDA caching
allocator."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rig_fixtures import GIB, MIB

from simgpu.allocator import Allocator, block_bytes, segment_bytes
from simgpu.expandable import ExpandableAllocator
from simgpu.units import as_pytorch_writes

# A real one: torch 2.11 on an H100 capped to 24e9 bytes.
REAL_MESSAGE = (
    "CUDA out of memory. Tried to allocate 108.00 MiB. GPU 0 has a total capacity of 79.18 GiB of"
    " which "
    "56.23 GiB is free. Including non-PyTorch memory, this process has 22.94 GiB memory in use."
    " 22.35 GiB "
    "allowed; Of the allocated memory 22.02 GiB is allocated by PyTorch, and 332.87 MiB is"
    " reserved by "
    "PyTorch but unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See documentation"
    " for Memory "
    "Management  (https://docs.pytorch.org/docs/stable/notes/cuda.html"
    "#optimizing-memory-usage-with-pytorch-cuda-alloc-conf)"
)
H100_BYTES = 85_017_493_504


class Fragmented(Allocator):
    """Keeps unused memory that it cannot give back, as a fragmented card does."""

    def empty_cache(self):
        pass


def small_card(total_bytes: int = 64 * MIB, **arguments) -> Allocator:
    return Allocator(0, "NVIDIA Test", total_bytes, **arguments)


@pytest.mark.parametrize(
    ("requested", "taken"),
    [(0, 512), (1, 512), (511, 512), (512, 512), (513, 1024), (30 * MIB + 1, 30 * MIB + 512)],
)
def test_a_request_looks_for_the_next_multiple_of_512_bytes(requested, taken):
    assert block_bytes(requested) == taken


@pytest.mark.parametrize(
    ("requested", "taken", "reserved"),
    [
        (1, 512, 2 * MIB),  # the small pool splits whenever a block is left over
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (9 * MIB, 9 * MIB, 20 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),  # in the large pool 1 MiB is not enough to be worth a block
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),
        (30 * MIB, 30 * MIB, 30 * MIB),
    ],
)
def test_a_block_is_split_off_where_enough_is_left_and_taken_whole_otherwise(
    requested, taken, reserved
):
    allocator = small_card()
    assert allocator.allocate(requested).size == taken == allocator.allocated
    assert allocator.reserved == reserved


@pytest.mark.parametrize(
    ("requested", "segment"),
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 512, 12 * MIB),
        (108 * MIB, 108 * MIB),
    ],
)
def test_the_message_names_the_segment_pytorch_would_have_asked_the_driver_for(requested, segment):
    assert segment_bytes(requested) == segment
    with pytest.raises(torch.OutOfMemoryError, match=f"Tried to allocate {segment // MIB}.00 MiB"):
        small_card(total_bytes=256).allocate(requested)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1024, "1024 bytes"),
        (1025, "1.00 KiB"),
        (MIB, "1024.00 KiB"),
        (MIB + 1, "1.00 MiB"),
        (GIB, "1024.00 MiB"),
        (GIB + 1, "1.00 GiB"),
        (round(1.157 * GIB), "1.16 GiB"),
    ],
)
def test_sizes_read_as_pytorch_prints_them(size, text):
    assert as_pytorch_writes(size) == text


def test_the_message_equals_a_real_one_given_the_same_bytes_and_then_names_the_simulated_card():
    allocated = round(22.02 * GIB)
    reserved = allocated + round(332.87 * MIB)
    # The real message rounds; this context fits all of its figures.
    context = round(22.944 * GIB) - reserved
    allocator = Fragmented(
        0, "NVIDIA H100 80GB HBM3", H100_BYTES, context, fraction=24e9 / H100_BYTES
    )
    allocator.allocated, allocator.reserved = allocated, reserved
    assert allocated + 108 * MIB < allocator.limit_bytes, "it is fragmentation that fails here"
    assert allocator._message(108 * MIB) == REAL_MESSAGE + " [simulated NVIDIA H100 80GB HBM3]"


def test_without_a_cap_the_message_says_nothing_of_an_allowed_size():
    with pytest.raises(torch.OutOfMemoryError) as error:
        small_card().allocate(GIB)
    sizes = r"[\d.]+ (GiB|MiB|KiB|bytes)"
    expected = re.sub(sizes, "#", REAL_MESSAGE).replace("# allowed; ", "")
    assert re.sub(sizes, "#", str(error.value)) == expected + " [simulated NVIDIA Test]"


def test_the_error_has_the_message_as_its_only_argument_as_accelerate_expects():
    with pytest.raises(torch.OutOfMemoryError) as error:
        small_card().allocate(GIB)
    assert len(error.value.args) == 1


def test_the_context_is_not_for_pytorch_to_give_out():
    allocator = small_card(total_bytes=10 * MIB, context_bytes=4 * MIB)
    assert allocator.free_bytes == 6 * MIB
    for _ in range(6):
        allocator.allocate(MIB)
    assert allocator.free_bytes == 0
    with pytest.raises(torch.OutOfMemoryError):
        allocator.allocate(1)


def test_a_per_process_fraction_caps_pytorch_below_the_card():
    allocator = small_card(total_bytes=100 * MIB, fraction=0.5)
    allocator.allocate(50 * MIB)
    with pytest.raises(torch.OutOfMemoryError, match="50.00 MiB allowed; Of the allocated"):
        allocator.allocate(512)


def test_a_failed_request_changes_nothing():
    allocator = small_card()
    allocator.allocate(30 * MIB)
    before = (
        allocator.allocated,
        allocator.reserved,
        allocator.peak_allocated,
        allocator.peak_reserved,
    )
    with pytest.raises(torch.OutOfMemoryError):
        allocator.allocate(40 * MIB)
    assert (
        allocator.allocated,
        allocator.reserved,
        allocator.peak_allocated,
        allocator.peak_reserved,
    ) == before


def test_a_failed_request_first_gives_back_what_is_cached_and_the_message_counts_it_as_free():
    allocator = small_card()
    kept, freed = allocator.allocate(10 * MIB), allocator.allocate(40 * MIB)
    allocator.free(freed)
    with pytest.raises(torch.OutOfMemoryError) as error:
        allocator.allocate(60 * MIB)
    assert "of which 54.00 MiB is free" in str(error.value)
    assert "10.00 MiB is allocated by PyTorch, and 0 bytes is reserved" in str(error.value)
    assert allocator.reserved == kept.size


def test_a_request_that_finds_room_only_after_the_cache_is_given_back_counts_a_retry():
    allocator = small_card()
    allocator.free(allocator.allocate(40 * MIB))
    assert allocator.allocate(50 * MIB).size == 50 * MIB
    assert (allocator.retries, allocator.reserved) == (1, 50 * MIB)


def test_peaks_stay_when_memory_is_freed_until_they_are_reset():
    allocator = small_card()
    kept, freed = allocator.allocate(12 * MIB), allocator.allocate(16 * MIB)
    allocator.free(freed)
    assert (allocator.allocated, allocator.peak_allocated) == (kept.size, 28 * MIB)
    allocator.reset_peaks()
    assert allocator.peak_allocated == kept.size
    assert allocator.peak_reserved == allocator.reserved == 28 * MIB


def test_freed_memory_stays_reserved_until_the_cache_is_emptied():
    allocator = small_card()
    kept, freed = allocator.allocate(12 * MIB), allocator.allocate(16 * MIB)
    allocator.free(freed)
    assert allocator.reserved == 28 * MIB
    assert allocator.free_bytes == allocator.total_bytes - 28 * MIB
    allocator.empty_cache()
    assert allocator.reserved == kept.size
    assert allocator.free_bytes == allocator.total_bytes - kept.size


def test_a_segment_with_one_block_in_use_cannot_be_given_back():
    allocator = small_card()
    pieces = [allocator.allocate(4 * MIB) for _ in range(5)]
    for piece in pieces[:2] + pieces[3:]:
        allocator.free(piece)
    allocator.empty_cache()
    assert (allocator.allocated, allocator.reserved) == (4 * MIB, 20 * MIB)


def test_free_neighbours_merge_into_one_block_large_enough_for_both():
    allocator = small_card()
    first, second, third, fourth = [allocator.allocate(5 * MIB) for _ in range(4)]
    allocator.free(first)
    allocator.free(third)
    allocator.free(second)  # between two free ones: all three become one
    assert allocator.allocate(15 * MIB).address == first.address
    assert allocator.reserved == 20 * MIB
    assert fourth.address == first.address + 15 * MIB


def test_the_smallest_block_that_is_large_enough_is_used_first():
    allocator = small_card(total_bytes=200 * MIB)
    blocks = [allocator.allocate(size * MIB) for size in (40, 20, 30)]
    for block in blocks:
        allocator.free(block)
    assert allocator.allocate(20 * MIB - 512).address == blocks[1].address
    assert allocator.allocate(22 * MIB).address == blocks[2].address
    assert allocator.reserved == 90 * MIB


def test_small_and_large_requests_have_pools_of_their_own():
    allocator = small_card()
    allocator.free(allocator.allocate(30 * MIB))
    allocator.allocate(MIB)
    assert allocator.reserved == 32 * MIB


def fragmented(allocator):
    """Fill 60 MiB with blocks of 3 MiB and free every other one: half is free, no 4 MiB are in one
    piece."""
    pieces = [allocator.allocate(3 * MIB + MIB // 2) for _ in range(15)]
    for piece in pieces[::2]:
        allocator.free(piece)


def test_a_request_fails_for_fragmentation_with_more_than_enough_free_in_pieces():
    allocator = small_card(total_bytes=60 * MIB)
    fragmented(allocator)
    assert allocator.reserved - allocator.allocated > 30 * MIB
    with pytest.raises(torch.OutOfMemoryError, match="MiB is reserved by PyTorch but unallocated"):
        allocator.allocate(12 * MIB)


def test_expandable_segments_serve_what_fixed_ones_are_too_fragmented_for():
    def request_beside_a_hole(allocator):
        allocator.free(allocator.allocate(40 * MIB))
        kept, hole = allocator.allocate(10 * MIB), allocator.allocate(30 * MIB)
        assert hole.address == kept.address + 10 * MIB
        allocator.free(hole)
        return allocator.allocate(36 * MIB)

    with pytest.raises(
        torch.OutOfMemoryError, match="30.00 MiB is reserved by PyTorch but unallocated"
    ):
        request_beside_a_hole(small_card(total_bytes=70 * MIB))
    expandable = ExpandableAllocator(0, "NVIDIA Test", 70 * MIB)
    assert request_beside_a_hole(expandable).size == 36 * MIB
    assert expandable.reserved == 60 * MIB, "memory comes in units of 20 MiB"


def test_expandable_segments_give_back_the_units_inside_a_segment_in_use():
    allocator = ExpandableAllocator(0, "NVIDIA Test", 200 * MIB)
    first, second, third = (allocator.allocate(40 * MIB) for _ in range(3))
    assert first.address + 40 * MIB == second.address  # one segment that grew
    allocator.free(second)
    allocator.empty_cache()
    assert allocator.reserved == allocator.allocated == 80 * MIB
    assert allocator.allocate(40 * MIB).address == second.address
    assert third.address == second.address + 40 * MIB


def test_blocks_above_max_split_size_are_kept_whole_and_given_back_to_make_room():
    allocator = small_card(total_bytes=70 * MIB, max_split_bytes=32 * MIB)
    allocator.free(allocator.allocate(40 * MIB))
    allocator.free(
        allocator.allocate(12 * MIB)
    )  # without the option it would be cut from the 40 MiB
    assert allocator.reserved == 52 * MIB
    allocator.allocate(30 * MIB)
    assert allocator.reserved == 42 * MIB, "the 40 MiB are given back, the 12 MiB stay cached"
    assert allocator.retries == 0


def test_options_pytorch_would_refuse_are_refused():
    with pytest.raises(ValueError, match="max_split_size_mb is 20"):
        small_card(max_split_bytes=20 * MIB)
    with pytest.raises(ValueError, match="Leave max_split_size_mb out"):
        ExpandableAllocator(0, "NVIDIA Test", 64 * MIB, max_split_bytes=32 * MIB)


def of_kind(kind: str, context_bytes: int) -> Allocator:
    options = {"max_split_bytes": 21 * MIB} if kind == "max_split_size" else {}
    make = ExpandableAllocator if kind == "expandable_segments" else Allocator
    return make(0, "NVIDIA Test", 160 * MIB, context_bytes, **options)


ACTIONS = st.one_of(
    st.integers(1, 4096).map(lambda size: ("allocate", size)),
    st.integers(1, 3 * MIB).map(lambda size: ("allocate", size)),
    st.integers(1, 40 * MIB).map(lambda size: ("allocate", size)),
    st.integers(0, 200).map(lambda which: ("free", which)),
    st.integers(0, 200).map(lambda which: ("free", which)),
    st.just(("empty_cache", 0)),
    st.just(("reset_peaks", 0)),
)


@pytest.mark.parametrize("kind", ["default", "max_split_size", "expandable_segments"])
@given(st.lists(ACTIONS, max_size=80), st.integers(0, 30 * MIB))
def test_blocks_never_overlap_figures_stay_in_order_and_everything_can_be_given_back(
    kind, actions, context
):
    allocator = of_kind(kind, context)
    held = []
    for action, value in actions:
        if action == "allocate":
            before = allocator.allocated
            try:
                held.append(allocator.allocate(value))
                assert held[-1].size >= block_bytes(value)
            except torch.OutOfMemoryError:
                assert allocator.allocated == before
        elif action == "free":
            if held:
                allocator.free(held.pop(value % len(held)))
        else:
            getattr(allocator, action)()
        spans = sorted((block.address, block.address + block.size) for block in held)
        assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False))
        assert allocator.allocated == sum(block.size for block in held)
        assert 0 <= allocator.allocated <= allocator.reserved <= allocator.limit_bytes
        assert allocator.allocated <= allocator.peak_allocated <= allocator.peak_reserved
        assert allocator.reserved <= allocator.peak_reserved
        assert allocator.free_bytes >= 0
    for block in held:
        allocator.free(block)
    # All merged: what is free are whole segments, so that nothing stays behind.
    allocator.empty_cache()
    assert allocator.allocated == allocator.reserved == 0


def test_cached_memory_is_used_again_even_above_a_cap_set_later():
    allocator = small_card()
    allocator.free(allocator.allocate(40 * MIB))
    allocator.fraction = 0.5
    assert allocator.allocate(40 * MIB).size == 40 * MIB


def test_a_cap_set_below_what_is_allocated_leaves_the_figures_consistent():
    allocator = small_card(total_bytes=100 * MIB)
    allocator.allocate(60 * MIB)
    allocator.fraction = 0.5
    with pytest.raises(
        torch.OutOfMemoryError, match="60.00 MiB is allocated by PyTorch, and 0 bytes is reserved"
    ):
        allocator.allocate(512)
    assert allocator.reserved == allocator.allocated
