"""What CUDA's operators take besides their results: allocations of traces on an H100 (torch 2.11,
2026-11-27; those of the image tower 2026-11-25 and -26)."""

import pytest
import torch

from simgpu import Rig, find_card
from simgpu.attention import choose_kernel
from simgpu.convolution import forward_scratch
from simgpu.scratch import Unmodelled, scratch
from simgpu.sorting import Early, radix_sort
from simgpu.units import MIB

ATEN = torch.ops.aten
H100 = find_card("H100")


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def taken(operator, *args, **kwargs) -> list | None:
    """What an operator takes that runs on meta tensors."""
    results = operator(*args, **kwargs)
    results = [results] if isinstance(results, torch.Tensor) else list(results)
    return scratch(operator, args, kwargs, results, H100)


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        # Gradients of a norm's weight and of the biases of keys and values, for two images and 32
        # tokens.
        ((2, 1634, 4096), [109_051_904, 128]),
        ((2, 1634, 256), [6_815_744, 8]),
        # 256 positions are few enough for one block of threads.
        ((1, 256, 4096), []),
    ],
)
def test_sums_over_positions_take_room_for_partial_sums(shape, found):
    assert taken(ATEN.sum.dim_IntList, meta(*shape, dtype=torch.bfloat16), [0, 1]) == found


@pytest.mark.parametrize(
    ("operator", "shape", "arguments", "found"),
    [
        (ATEN.std.correction, (4096, 4096), ([0],), [536_870_912, 128]),
        (ATEN.std.correction, (64, 150_000), ([1],), [9_216, 256]),
        (ATEN.std.correction, (16, 12, 200, 200), ([0, 2],), [245_760_000, 76]),
        (ATEN.sum.dim_IntList, (16, 12, 200, 200), ([0, 2],), [61_440_000, 76]),
        (ATEN.sum.default, (10_000_000,), (), [2_112, 4]),
        (ATEN.sum.dim_IntList, (64, 150_000), ([0],), []),
        (ATEN.sum.dim_IntList, (4, 1000, 30), ([0, 2],), []),
        (ATEN.argmax.default, (4096, 4096), (0,), [536_870_912, 128]),
        (ATEN.max.dim, (4096, 4096), (0,), [536_870_912, 128]),
        (ATEN.sum.dim_IntList, (0, 4), ([0],), []),
        (ATEN.cumsum.default, (10_000_000,), (0,), [42_495]),
        (ATEN.cumsum.default, (64, 150_000), (1,), []),
        (ATEN.sort.default, (1000,), (), [[8_000]]),
        (ATEN.sort.default, (1_000_000,), (), [8_000_000, [12_200_191]]),
        (ATEN.sort.default, (200, 5000), (), [8_000_000, 12_000_255]),
        (
            ATEN.sort.default,
            (127, 5000),
            (),
            [5_080_000, 5_080_000, [2_540_000, 7_750_655], [116_223]],
        ),
        (
            ATEN.topk.default,
            (64, 150_000),
            (50,),
            [[256, 512, 512, 425_984, 65_536, 3_328, 3_328, [1_279], [1_279]]],
        ),
        (ATEN.topk.default, (64, 1000), (5,), []),
        (ATEN.multinomial.default, (64, 150_000), (1,), [38_400_000, [9_216, 256]]),
        (ATEN._softmax_backward_data.default, (64, 1000), None, [256_000]),
        (ATEN.mm.default, (64, 64), None, []),
        (ATEN.relu.default, (64, 64), (), []),
        (ATEN.view.default, (64, 64), ([-1],), []),
    ],
    ids=lambda value: str(value)[:40],
)
def test_operators_take_what_their_traces_show(operator, shape, arguments, found):
    tensor = meta(*shape)
    if arguments is None:
        arguments = (tensor, 1, tensor.dtype) if "backward" in str(operator) else (tensor,)
    assert taken(operator, tensor, *arguments) == found


def test_sums_of_truth_values_are_sums_of_a_copy():
    found = taken(ATEN.sum.default, meta(10_000_000, dtype=torch.bool))
    assert found == [80_000_000, 4_224, 4]


@pytest.mark.parametrize(
    ("count", "key", "value", "bits", "found"),
    [
        (4097, 4, 8, None, 59_391),
        (30_000_000, 4, 8, None, 365_723_647),
        (1_000_000, 2, 8, None, 10_187_007),
        (1_000_000, 1, 8, None, 299_519),
        (9_600_000, 8, 0, 6, 1_709_567),
        (100_000, 8, 8, 17, 1_629_183),
        (1000, 4, 8, None, 1),
    ],
)
def test_radix_sorts_take_copies_and_a_row_of_counts_for_each_block(count, key, value, bits, found):
    assert radix_sort(count, key, value, bits) == found


def test_the_gradient_of_an_embedding_sorts_its_indices():
    indices = meta(3073, dtype=torch.int64)
    found = taken(
        ATEN.embedding_dense_backward.default, meta(3073, 512), indices, 50_000, -1, False
    )
    assert found[0] == Early([24_584, 24_584, [24_584, 67_583]])
    assert found[-2:] == [27_040, 6_922_240]
    few = meta(3072, dtype=torch.int64)
    assert (
        taken(ATEN.embedding_dense_backward.default, meta(3072, 512), few, 50_000, -1, False) == []
    )


@pytest.mark.parametrize(
    ("batch", "positions", "found"), [(1, 256, 8_421_632), (2, 1634, 107_504_384)]
)
def test_attention_backward_of_grouped_heads(batch, positions, found):
    query, key = (meta(batch, heads, positions, 128, dtype=torch.bfloat16) for heads in (32, 2))
    operator = ATEN._scaled_dot_product_cudnn_attention_backward.default
    assert scratch(operator, (query, query, key, key), {}, [query], H100) == [found]


@pytest.mark.parametrize(
    ("input", "weight", "stride", "dtype", "found"),
    [
        ((13, 3, 1120, 1120), (1792, 3, 14, 14), 14, torch.float16, 398_139_408),
        ((13, 3, 1120, 1120), (1792, 3, 14, 14), 14, torch.bfloat16, None),
        ((2, 3, 1120, 1120), (1792, 3, 14, 14), 14, torch.float32, 126_070_800),
        ((5, 3, 384, 384), (1152, 3, 14, 14), 14, torch.bfloat16, 23_807_248),
        ((32, 128, 56, 56), (128, 128, 3, 3), 2, torch.float32, 64_815_120),
        ((32, 64, 56, 56), (256, 64, 1, 1), 1, torch.bfloat16, None),
        ((2304, 3, 2, 14, 14), (1280, 3, 2, 14, 14), 14, torch.bfloat16, None),
    ],
)
def test_convolutions_take_copies_with_channels_side_by_side(input, weight, stride, dtype, found):
    input, weight = meta(*input, dtype=dtype), meta(*weight, dtype=dtype)
    dims = input.ndim - 2
    steps, none = [stride] * dims, [0] * dims
    padding = [1 if weight.shape[2] == 3 else 0] * dims
    steps[0] = min(steps[0], input.shape[2])
    output = ATEN.convolution.default(
        input, weight, None, steps, padding, [1] * dims, False, none, 1
    )
    arguments = {"input": input, "weight": weight, "stride": steps, "groups": 1}
    assert forward_scratch(arguments, [output], H100) == [[], *([] if found is None else [found])]


def test_the_gradients_of_a_convolution_hold_what_a_trace_shows():
    """Allocated at the same time, on four H200 (torch 2.11, 2026-11-27): the input laid out by
    channels, its gradient and the weight laid out, in the backward pass of GLM-4V's tower."""
    features = (2, 1792, 80, 80)
    with Rig("H200"):
        rows = torch.empty(2, 6401, 1792, dtype=torch.bfloat16, device="cuda")[:, 1:]
        image = rows.permute(0, 2, 1).reshape(features)
        weight = torch.empty(4096, 1792, 2, 2, dtype=torch.bfloat16, device="cuda")
        gradient = torch.empty(2, 4096, 40, 40, dtype=torch.bfloat16, device="cuda")
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        requested = "requested_bytes.all.peak"
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()[requested]
        settings = ([4096], [2, 2], [0, 0], [1, 1], False, [0, 0], 1)
        results = ATEN.convolution_backward(
            gradient, image, weight, *settings, (True, False, False)
        )
        without = torch.cuda.memory_stats()[requested] - before
        del results
        torch.cuda.reset_peak_memory_stats()
        ATEN.convolution_backward(gradient, image, weight, *settings, (True, True, False))
        both = torch.cuda.memory_stats()[requested] - before
    assert without == 45_875_200 + 58_720_256
    assert both == 2 * 45_875_200 + 58_720_256


ROWS = 10**6
_MASK = torch.arange(ROWS) % 2 == 0


@pytest.mark.parametrize(
    ("use", "most"),
    [
        (lambda table, on, under: table[on], 72_000_000),
        (lambda table, on, under: table[on, on % 16], 20_000_000),
        (lambda table, on, under: table[_MASK], 36_000_000),
        (lambda table, on, under: table.__setitem__(on, under), 8_000_000),
        (lambda table, on, under: table.__setitem__(_MASK, under), 4_000_000),
        (lambda table, on, under: table.index_put_((on,), under, accumulate=True), 112_229_887),
        (
            lambda table, on, under: table.index_put_((on.cuda(),), under, accumulate=True),
            120_229_887,
        ),
    ],
)
def test_indices_on_the_host_are_copied_to_the_card(use, most):
    """Bytes requested at the same time on an H200 (torch 2.11, 2026-11-27; there the mask was a
    random one, of 18 rows more, and the indices on the card were so before the count)."""
    with Rig("H200"):
        table, under = torch.empty(ROWS, 16, device="cuda"), torch.empty(16, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.peak"]
        kept = use(table, torch.arange(ROWS), under)
        assert torch.cuda.memory_stats()["requested_bytes.all.peak"] - before == most
        del kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_lstm_runs_in_one_call_whose_workspace_and_reserve_were_traced(dtype):
    rig = Rig.simulated("H100")
    with rig:
        layer = torch.nn.LSTM(128, 512, 2, batch_first=True).to("cuda", dtype)
        words = torch.empty(32, 100, 128, device="cuda", dtype=dtype)
        with rig.stage("forward") as stage:
            output, _ = layer(words)
        kept = {each.shape for each in rig.blocks() if each.stage == "forward"}
        output.sum().backward()
    reserve, workspace = (
        (72_089_856, 66_126_336) if dtype is torch.float32 else (36_045_056, 41_452_032)
    )
    assert (reserve,) in kept
    (memory,) = stage.memory
    assert memory.peak_allocated_bytes - memory.allocated_bytes == pytest.approx(
        workspace + words.nbytes, abs=2**20
    )
    pieces = {weight.grad.untyped_storage()._cdata for weight in layer.parameters()}
    assert len(pieces) == 1, "the gradients lie in one piece"
    assert rig.unmodelled == {}


@pytest.mark.parametrize("layer", ["GRU", "RNN"])
def test_other_recurrent_layers_train_and_are_said_to_be_inexact(layer):
    rig = Rig.simulated("L4")
    with rig:
        module = getattr(torch.nn, layer)(16, 32, 2, bidirectional=True).to("cuda")
        output, state = module(torch.empty(5, 3, 16, device="cuda"))
        output.sum().backward()
    assert output.shape == (5, 3, 64) and state.shape == (4, 3, 32)
    assert all(weight.grad.shape == weight.shape for weight in module.parameters())
    assert list(rig.unmodelled) == [{"GRU": "gru", "RNN": "rnn_tanh"}[layer]]


def test_an_operator_nobody_knows_of_is_named_and_counted():
    rig = Rig.simulated("L4")
    with rig:
        square = torch.empty(64, 64, device="cuda")
        torch.nn.functional.gelu(square @ square).softmax(-1).sum()
        assert (rig.unmodelled, rig.exactness) == ({}, "exact")
        for _ in range(2):
            torch.linalg.eigvals(square)
    # Three times its largest tensor, the 64 x 64 complex eigenvectors, and 8 MiB.
    assert rig.unmodelled == {"linalg_eig": 3 * 64 * 64 * 8 + 8 * MIB}
    assert rig.exactness == "not exact: 1 operator unmodelled, at most 8.09 MiB each (linalg_eig)"


def test_one_operator_without_a_bound_leaves_the_result_without_one():
    found = Unmodelled()
    found.note("mode", 2**20)
    found.note("histc", None)
    found.note("mode", 2**20)
    assert str(found) == "not exact: 2 operators unmodelled, with no known bound (histc, mode)"


def chosen(card: str, dtype=torch.bfloat16, width=64, values=None, heads=8, **options) -> str:
    query = meta(2, 8, options.pop("queries", 512), width, dtype=dtype)
    keys = options.pop("keys", 512)
    key = meta(2, heads, keys, width, dtype=dtype)
    value = meta(2, heads, keys, values or width, dtype=dtype)
    mask = options.pop("mask", None)
    settings = {"dropout_p": 0.0, "is_causal": False, "grouped": False, "needs_gradient": True}
    capability = find_card(card).compute_capability
    return choose_kernel(capability, query, key, value, mask, **settings | options)


MASK = meta(2, 1, 512, 512, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ("cudnn", {}),
        ("cudnn", {"mask": MASK}),
        ("cudnn", {"width": 256, "is_causal": True}),
        ("cudnn", {"width": 192, "values": 128}),
        ("cudnn", {"dropout_p": 0.1}),
        ("cudnn", {"heads": 2, "grouped": True, "mask": MASK}),
        ("flash", {"width": 61}),
        ("flash", {"keys": 1}),
        ("efficient", {"width": 512}),
        ("efficient", {"mask": MASK.clone().requires_grad_()}),
        ("efficient", {"dtype": torch.float32, "width": 192, "values": 128}),
        ("math", {"dtype": torch.float32, "heads": 2, "grouped": True}),
        ("math", {"dtype": torch.float32, "width": 61}),
    ],
)
def test_an_h100_picks_the_kernel_it_was_seen_to_pick(kernel, options):
    assert chosen("H100", **options) == kernel


@pytest.mark.parametrize(
    ("card", "kernel", "options"),
    [
        ("L4", "flash", {}),
        ("L4", "efficient", {"mask": MASK}),
        ("L4", "math", {"mask": MASK, "heads": 2, "grouped": True}),
        ("L4", "efficient", {"is_causal": True, "keys": 100}),
        # Too wide for the little shared memory of Ada cards, in training.
        ("L4", "efficient", {"width": 200}),
        ("L4", "flash", {"width": 200, "needs_gradient": False}),
        ("A100-80", "flash", {"width": 200}),
        ("T4", "efficient", {"dtype": torch.float16}),
        ("T4", "math", {}),
        ("T4", "efficient", {"dtype": torch.float32, "width": 61}),
    ],
)
def test_other_cards_pick_as_pytorchs_sources_say(card, kernel, options):
    assert chosen(card, **options) == kernel
