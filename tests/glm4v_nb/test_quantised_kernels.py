"""Fused products of quantised weights, by Triton's interpreter in float32, beside plain ones."""

import pytest
import torch

from glm4v_nb.inference import fast, load
from glm4v_nb.inference.decoding import arguments
from glm4v_nb.inference.fast import FastDecoder
from glm4v_nb.inference.weights import Weight
from glm4v_nb.miniature import CHECKPOINT, sample_pictures

EPSILON = 1e-5


@pytest.fixture(scope="module", autouse=True)
def kernels(interpreter):
    from glm4v_nb.inference import kernels

    return kernels


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Int4TilePackedTo4dTensor:
    """As torchao's, whose own kernels and packing need a GPU: (rows, columns) in groups of 128."""

    def __init__(self, rows: int, columns: int, seed: int):
        draw = torch.Generator().manual_seed(seed)
        numbers = torch.randint(0, 16, (rows, columns), generator=draw)
        groups = -(-columns // 1024) * 8
        self.shape, self.block_size = torch.Size((rows, columns)), [1, 128]
        self.tensor_data_names = ["qdata", "scale_and_zero"]
        self.qdata = torch.zeros(rows // 8, groups, 32, 4, dtype=torch.int64)
        row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
        lane = row % 8 * 4 + column % 8 // 2
        shift = column % 32 // 8 * 4 + column % 2 * 16
        place = row // 8, column // 128, lane, column % 128 // 32
        self.qdata.index_put_(place, numbers << shift, accumulate=True)
        self.qdata = self.qdata.to(torch.int32)
        scale = torch.rand(groups, rows, generator=draw) * 0.1 + 0.01
        zero = torch.randn(groups, rows, generator=draw) * 0.1
        self.scale_and_zero = torch.stack((scale, zero), -1).to(torch.bfloat16)
        scale, zero = (
            each.float()[: columns // 128].T.repeat_interleave(128, 1)
            for each in self.scale_and_zero.unbind(-1)
        )
        self.right = (numbers - 8) * scale + zero

    def __len__(self):
        return self.shape[0]


class Int8Tensor:
    """As torchao's, with a scale for each row."""

    def __init__(self, rows: int, columns: int, seed: int):
        draw = torch.Generator().manual_seed(seed)
        self.shape, self.block_size = torch.Size((rows, columns)), [1, columns]
        self.tensor_data_names = ["qdata", "scale"]
        self.qdata = torch.randint(-127, 128, (rows, columns), generator=draw, dtype=torch.int8)
        self.scale = torch.rand(rows, 1, generator=draw) * 0.01 + 0.001
        self.right = self.qdata * self.scale

    def __len__(self):
        return self.shape[0]


KINDS = [Int8Tensor, Int4TilePackedTo4dTensor]
# Rows of a step, of a tile of the weight, columns of it.
SHAPES = [(1, 16, 256), (1, 32, 512), (2, 16, 256), (3, 16, 256), (8, 32, 256)]


def launch(kernel, weight: Weight, x, gain, *operands, rows, shape, **constants):
    _, tile, columns = shape
    kernel[(-(-weight.shape[0] // tile),)](
        x, gain, weight.numbers, weight.scales, *operands, K=weight.shape[1], ROWS=rows, R=8,
        EPSILON=EPSILON, BITS=weight.bits, BN=tile, BK=columns, PDL=False,
        **constants,
    )  # fmt: skip


def normalised(x, gain):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * gain


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_that_of_the_weights_that_its_numbers_stand_for(kernels, kind, shape):
    rows, columns = shape[0], 1280  # of 4 bits kept in 16 groups, of which 10 are filled
    given = kind(48, columns, seed=1)  # the last tile of 32 has half of its rows
    x, gain, residual = random(rows, columns), random(columns, seed=2), random(rows, 48, seed=3)
    for norm in (False, True):
        y = torch.full((rows, 48), torch.nan)
        launch(kernels.project, Weight.of(given), x, gain, residual, y, rows=rows, shape=shape,
               OUTPUTS=48, NORM=norm, RESIDUAL=not norm)  # fmt: skip
        right = normalised(x, gain) @ given.right.T if norm else x @ given.right.T + residual
        torch.testing.assert_close(y, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES[1:3])
@pytest.mark.parametrize("kind", KINDS)
def test_gate_and_up_meet(kernels, kind, shape):
    rows, given = shape[0], kind(48, 256, seed=1)
    x, gain, y = random(rows, 256), random(256, seed=2), torch.full((rows, 24), torch.nan)
    launch(kernels.project_gated, Weight.of(given), x, gain, y, rows=rows, shape=shape, OUTPUTS=24)
    gate, up = (normalised(x, gain) @ given.right.T).chunk(2, -1)
    right = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(y, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES[1:3])
@pytest.mark.parametrize("kind", KINDS)
def test_queries_keys_and_values_of_three_weights_are_those_of_one(kernels, kind, shape):
    rows, heads, groups, depth = shape[0], 4, 2, 16
    parts = [kind(rows * depth, 256, seed) for seed, rows in enumerate((heads, groups, groups))]
    before = [part.right.clone() for part in parts]
    weight = Weight.of(*parts)
    assert weight.shape == ((heads + 2 * groups) * depth, 256)
    x, gain, bias = random(rows, 256), random(256, seed=2), random(weight.shape[0], seed=3)
    queries = torch.full((rows, heads, depth), torch.nan)
    keys, values = torch.zeros(2, rows, groups, 5, depth).unbind()
    cosines, sines = torch.ones(8, 4), torch.zeros(8, 4)  # none is turned
    row = torch.arange(rows, dtype=torch.int32)
    launch(kernels.project_heads, weight, x, gain, bias, cosines, sines, row, row * 0 + 3, row,
           queries, keys, values, 5, rows=rows, shape=shape, HEADS=heads, GROUPS=groups, D=depth,
           ROTARY=8)  # fmt: skip
    right = normalised(x, gain) @ torch.cat(before).T + bias
    right = right.split([heads * depth, groups * depth, groups * depth], -1)
    found = queries.flatten(1), keys[:, :, 3].flatten(1), values[:, :, 3].flatten(1)
    for ours, expected in zip(found, right, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    # The three are now views of one, and asked again nothing is copied.
    again = Weight.of(*parts)
    assert again.numbers.data_ptr() == weight.numbers.data_ptr() == parts[0].qdata.data_ptr()
    assert again.scales.data_ptr() == weight.scales.data_ptr()
    torch.testing.assert_close(parts[2].qdata, kind(groups * depth, 256, 2).qdata)


@pytest.fixture(scope="module")
def quantised():
    """The miniature in int8, whose arithmetic is in float32 here."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "CAPACITY_STEP", 64)  # each program costs milliseconds: few splits
        yield load(CHECKPOINT, weights="int8", keep=[], dtype=torch.float32, decoding="fast")


def test_an_int8_models_answer_is_eagers_own(quantised):
    model, processor = quantised
    assert type(model.lm_head.weight).__name__ == "Int8Tensor"
    inputs = processor([sample_pictures()["One shape"]], ["What colour is the heart?"])
    how = {"max_new_tokens": 4, "do_sample": False}
    plain = model.generate(**inputs, **how)
    fused = model.generate(**inputs, **how, **arguments(model, None))
    assert torch.equal(plain, fused)
    assert model.fast_decoder.steps >= plain.shape[1] - inputs["input_ids"].shape[1] - 1 > 0


def test_a_verifying_step_of_an_int8_model_is_as_near_as_the_models_own(quantised):
    model, _ = quantised
    ids = torch.arange(100, 124)[None]
    decoder = FastDecoder()
    cache = decoder.prepare(model, 1, 40, rows=(3,))
    model(ids[:, :-3], past_key_values=cache.empty())
    step, slots = decoder._steps[3], [21, 22, 23]
    step.place(slots, slots, [0] * 3, [0] * 3)
    step.tokens.copy_(ids[0, -3:])
    step()
    right = model(ids).logits[0, -3:]
    torch.testing.assert_close(step.logits, right, rtol=1e-3, atol=1e-3)
