"""The attention of a decode step by itself, over more blocks of keys than one."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

HEADS, GROUPS, DEPTH, CAPACITY, BLOCK = 4, 2, 16, 128, 16


@pytest.mark.parametrize("splits", [1, 2, 8])
@pytest.mark.parametrize(
    ("starts", "slots", "sequences"),
    [([0], [100], [0]), ([5], [36], [0]), ([0, 0, 0], [40, 41, 42], [0, 0, 0]),
     ([0, 9], [80, 16], [1, 0])],
)  # fmt: skip
def test_each_row_sees_its_sequence_from_start_to_slot(
    interpreter, splits, starts, slots, sequences
):
    from glm4v_nb.inference import kernels

    torch.manual_seed(0)
    rows, state = len(starts), [torch.tensor(each, dtype=torch.int32) for each in (starts, slots)]
    queries = torch.randn(rows, HEADS, DEPTH)
    keys, values = torch.randn(2, max(sequences) + 1, GROUPS, CAPACITY, DEPTH).unbind()
    parts, y = torch.zeros(rows, HEADS, splits, DEPTH), torch.zeros(rows, HEADS, DEPTH)
    maxima, totals = torch.zeros(2, rows, HEADS, splits).unbind()
    kernels.attend[(rows, GROUPS, splits)](
        queries, keys, values, *state, torch.tensor(sequences, dtype=torch.int32), parts, maxima,
        totals, CAPACITY, SCALE=DEPTH**-0.5, HEADS=HEADS, GROUPS=GROUPS, H=16, D=DEPTH,
        SPLITS=splits, BT=BLOCK, ALONE=len({*sequences}) == rows, PDL=0,
    )  # fmt: skip
    kernels.combine[(rows * HEADS,)](parts, maxima, totals, y, D=DEPTH, SPLITS=splits, PDL=0)
    for row, (start, slot, sequence) in enumerate(zip(starts, slots, sequences, strict=True)):
        seen = slice(start, slot + 1)
        right = scaled_dot_product_attention(
            queries[row, :, None], keys[sequence, :, seen], values[sequence, :, seen],
            enable_gqa=True,
        )  # fmt: skip
        torch.testing.assert_close(y[row], right[:, 0], rtol=1e-5, atol=1e-5)
