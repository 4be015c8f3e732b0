"""Bytes on one simulated card, against the constants and the text of PyTorch's CUDA caching allocator."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rig_fixtures import GIB, MIB

from glm4v_nb.rig.allocator import Allocator, block_bytes, format_size, segment_bytes

# A real one: torch 2.11 on an H100 capped to 24e9 bytes.
REAL_MESSAGE = (
    "CUDA out of memory. Tried to allocate 108.00 MiB. GPU 0 has a total capacity of 79.18 GiB of which "
    "56.23 GiB is free. Including non-PyTorch memory, this process has 22.94 GiB memory in use. 22.35 GiB "
    "allowed; Of the allocated memory 22.02 GiB is allocated by PyTorch, and 332.87 MiB is reserved by "
    "PyTorch but unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See documentation for Memory "
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
    ("requested", "taken"), [(0, 0), (1, 512), (511, 512), (512, 512), (513, 1024), (MIB + 1, MIB + 512)]
)
def test_a_request_takes_the_next_multiple_of_512_bytes(requested, taken):
    assert block_bytes(requested) == taken
    allocator = small_card()
    assert allocator.allocate(requested) == taken == allocator.allocated


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
    assert format_size(size) == text


def test_the_message_equals_a_real_one_given_the_same_bytes_and_then_names_the_simulated_card():
    allocated = round(22.02 * GIB)
    reserved = allocated + round(332.87 * MIB)
    # The real message rounds; this context fits all of its figures.
    context = round(22.944 * GIB) - reserved
    allocator = Fragmented(0, "NVIDIA H100 80GB HBM3", H100_BYTES, context, fraction=24e9 / H100_BYTES)
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
    allocator.allocate(6 * MIB)
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
    before = (allocator.allocated, allocator.reserved, allocator.peak_allocated, allocator.peak_reserved)
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
    assert allocator.reserved == kept


def test_peaks_stay_when_memory_is_freed_until_they_are_reset():
    allocator = small_card()
    kept, freed = allocator.allocate(4 * MIB), allocator.allocate(8 * MIB)
    allocator.free(freed)
    assert (allocator.allocated, allocator.peak_allocated) == (kept, kept + freed)
    allocator.reset_peaks()
    assert allocator.peak_allocated == kept
    assert allocator.peak_reserved == allocator.reserved == 12 * MIB


def test_freed_memory_stays_reserved_until_the_cache_is_emptied():
    allocator = small_card()
    kept, freed = allocator.allocate(4 * MIB), allocator.allocate(8 * MIB)
    allocator.free(freed)
    assert allocator.reserved == 12 * MIB
    assert allocator.free_bytes == allocator.total_bytes - 12 * MIB
    allocator.empty_cache()
    assert allocator.reserved == kept
    assert allocator.free_bytes == allocator.total_bytes - kept


@given(
    st.lists(
        st.one_of(
            st.integers(0, 8 * MIB),  # allocate
            st.just("free"),
            st.just("empty_cache"),
            st.just("reset_peaks"),
        ),
        max_size=60,
    ),
    st.integers(0, 3 * MIB),
)
def test_allocated_never_exceeds_reserved_nor_reserved_the_limit_and_all_can_be_given_back(actions, context):
    allocator = small_card(total_bytes=20 * MIB, context_bytes=context)
    held = []
    for action in actions:
        if action == "free":
            if held:
                allocator.free(held.pop(0))
        elif isinstance(action, str):
            getattr(allocator, action)()
        else:
            try:
                held.append(allocator.allocate(action))
            except torch.OutOfMemoryError:
                assert allocator.allocated + action > allocator.limit_bytes - 512
        assert allocator.allocated == sum(held)
        assert 0 <= allocator.allocated <= allocator.reserved <= allocator.limit_bytes
        assert allocator.allocated <= allocator.peak_allocated <= allocator.peak_reserved
        assert allocator.reserved <= allocator.peak_reserved
        assert allocator.free_bytes >= 0
    for block in held:
        allocator.free(block)
    allocator.empty_cache()
    assert allocator.allocated == allocator.reserved == 0


def test_cached_memory_is_used_again_even_above_a_cap_set_later():
    allocator = small_card()
    allocator.free(allocator.allocate(40 * MIB))
    allocator.fraction = 0.5
    assert allocator.allocate(40 * MIB) == 40 * MIB


def test_a_cap_set_below_what_is_allocated_leaves_the_figures_consistent():
    allocator = small_card(total_bytes=100 * MIB)
    allocator.allocate(60 * MIB)
    allocator.fraction = 0.5
    with pytest.raises(
        torch.OutOfMemoryError, match="60.00 MiB is allocated by PyTorch, and 0 bytes is reserved"
    ):
        allocator.allocate(512)
    assert allocator.reserved == allocator.allocated
