"""Sizes in words, in this project's way and in PyTorch's, and read back."""

import pytest

from simgpu.units import GIB, KIB, MIB, as_pytorch_writes, bytes_in_words, parse_size


@pytest.mark.parametrize(
    ("size", "words", "of_pytorch"),
    [
        (0, "0 bytes", "0 bytes"),
        (KIB - 1, "1023 bytes", "1023 bytes"),
        (KIB, "1.0 KiB", "1024 bytes"),
        (MIB, "1.0 MiB", "1024.00 KiB"),
        (3 * MIB, "3.0 MiB", "3.00 MiB"),
        (GIB, "1.00 GiB", "1024.00 MiB"),
        (round(12.97 * GIB), "12.97 GiB", "12.97 GiB"),
    ],
)
def test_a_size_is_written_in_the_largest_unit_it_reaches_and_by_pytorch_in_one_it_exceeds(
    size, words, of_pytorch
):
    assert (bytes_in_words(size), as_pytorch_writes(size)) == (words, of_pytorch)
    assert parse_size(of_pytorch) == pytest.approx(size, rel=1e-3)


def test_a_size_is_read_with_its_unit_and_nothing_else_is_one():
    assert [parse_size(text) for text in ("1.50 GiB", "7 bytes")] == [3 * 2**29, 7]
    with pytest.raises(ValueError, match="'1.5 GB' is no size; expected a number and one of GiB"):
        parse_size("1.5 GB")
