"""Quantised weights on simulated cards: the same calls, and the bytes that the libraries hold."""

import importlib.util
import json

import pytest
import torch

from glm4v_nb.fit import Deployment
from glm4v_nb.inference import load
from glm4v_nb.miniature import CHECKPOINT
from glm4v_nb.model.quantising import check_described, packed_shapes, parts_of
from glm4v_nb.workload import Workload
from simgpu import Rig, fitting
from simgpu.limits import Trials, limits
from simgpu.scratch import bound_bytes, scratch
from simgpu.units import MIB


def needs(library):
    return pytest.mark.skipif(
        importlib.util.find_spec(library) is None, reason=f"{library} is not installed"
    )


FORMATS = {"int8": "torchao", "int4": "torchao", "nf4": "bitsandbytes"}
FORMATS = [pytest.param(name, marks=needs(library)) for name, library in FORMATS.items()]
SHORT = Workload(text_tokens=8, new_tokens=4)


def in_blocks(tensors) -> int:
    """What PyTorch's allocator gives to the storages of tensors: multiples of 512 bytes."""
    storages = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}
    return sum(-(-size // 512) * 512 for size in storages.values())


@pytest.mark.parametrize("weights", FORMATS)
def test_cards_hold_what_the_libraries_make_of_the_weights(weights):
    with Rig.simulated("L4") as rig:
        model, _ = load(CHECKPOINT, weights=weights, device_map={"": 0})
        (card,) = rig.memory()
        held = [part for tensor in model.parameters() for part in parts_of(tensor)]
    # Beside them there are buffers, and bitsandbytes keeps a table for all.
    assert 0 <= card.allocated_bytes - in_blocks(held) < 4096
    if weights == "int4":  # which no CPU has
        matrix = model.language_model.layers[0].mlp.down_proj.weight
        assert type(matrix).__name__ == "Int4TilePackedTo4dTensor"
        described = {"_type": type(matrix).__name__, "_data": {"block_size": matrix.block_size}}
        shapes = {"a._weight_qdata": [*matrix.qdata.shape]}
        shapes["a._weight_scale_and_zero"] = [*matrix.scale_and_zero.shape]
        check_described(None, {"a.weight": json.dumps(described)}, shapes)  # as it would be saved
        assert shapes["a._weight_qdata"] in packed_shapes([*matrix.shape])
        return
    real, _ = load(CHECKPOINT, weights=weights)
    parts = [part for tensor in real.parameters() for part in parts_of(tensor)]
    assert in_blocks(parts) == in_blocks([p for one in model.parameters() for p in parts_of(one)])


@pytest.mark.parametrize("weights", FORMATS)
def test_fit_answers_for_quantised_weights(weights):
    plain = Deployment("L4", checkpoint=CHECKPOINT).fit(SHORT)
    result = Deployment("L4", checkpoint=CHECKPOINT, weights=weights).fit(SHORT)
    assert result.fits
    saved = plain.devices[0].weights_bytes - result.devices[0].weights_bytes
    # 4,454,400 numbers are in matrices other than the head. Rows of 192 and 256, which int4 fills
    # up to 1024, take more than they did.
    assert saved > {"int8": 4.3e6, "int4": -1e6, "nf4": 6e6}[weights]
    # The image has 38 positions and the prompt 46, for which bitsandbytes has more than one way.
    assert set(result.unmodelled) == ({"bitsandbytes::gemm_4bit"} if weights == "nf4" else set())


@needs("torchao")
def test_an_automatic_map_counts_quantised_weights():
    """Two cards that hold the model's halves in bfloat16 hold it whole in 8 bits."""
    placement = {}
    for weights in (None, "int8"):
        deployment = Deployment("L4", 2, checkpoint=CHECKPOINT, weights=weights)
        sizes = deployment.weights_bytes(deployment.plan("sequential", {0: 9 * MIB, 1: 9 * MIB}))
        placement[weights] = sizes
    assert placement[None][1] > 0
    assert placement["int8"][1] == 0


def test_what_quantised_weights_cannot_be_asked_is_refused():
    with pytest.raises(ValueError, match="weights is 'int3'; expected one of int8, int4, nf4"):
        Deployment("L4", checkpoint=CHECKPOINT, weights="int3").fit(SHORT)
    with pytest.raises(ValueError, match="a training step of quantised weights"):
        Deployment("L4", checkpoint=CHECKPOINT, weights="nf4").check(
            Workload(train=True, new_tokens=0)
        )
    from transformers import LlamaConfig

    other = fitting.Deployment("L4", checkpoint=LlamaConfig(num_hidden_layers=1), weights="nf4")
    with pytest.raises(ValueError, match="the package of LlamaForCausalLM does not say how"):
        other.fit()


@needs("torchao")
def test_the_search_for_limits_says_that_it_has_no_lines_for_quantised_weights():
    trials = Trials(Deployment("L4", checkpoint=CHECKPOINT, weights="int8"), lambda *_: None)
    with pytest.raises(ValueError, match="Leave --limits out"):
        limits(trials, SHORT)


@needs("bitsandbytes")
@pytest.mark.parametrize(
    ("rows", "shape", "nested", "taken", "bound"),
    [
        # Decoding: the kernel reads the 4 bits.
        (1, [13696, 4096], True, [], 0),
        # A prompt with an image: scales in two steps, then the weights, and only then the result.
        (1634, [256, 4096], True, [65536, 65536, 2097152], 0),
        (1634, [256, 4096], False, [2097152], 0),
        (600, [13696, 4096], False, [112197632], 0),
        # Between them it depends on the card; the most is taken, and named.
        (100, [256, 4096], False, [2097152], 2097152),
    ],
)
def test_few_bits_are_made_whole_before_a_product_of_many_rows(rows, shape, nested, taken, bound):
    import bitsandbytes  # noqa: F401  (defines the operator)

    blocks = shape[0] * shape[1] // 64
    make = {"device": "meta"}
    scales = {"absmax_8bit": torch.empty(blocks, dtype=torch.uint8, **make)} if nested else {}
    arguments = (
        torch.empty(1, rows, shape[1], dtype=torch.bfloat16, **make),
        torch.empty(shape[0] * shape[1] // 2, 1, dtype=torch.uint8, **make),
        shape,
        torch.empty(blocks // 256 if nested else blocks, **make),
        64,
        "nf4",
    )
    operator = torch.ops.bitsandbytes.gemm_4bit.default
    result = [torch.empty(1, rows, shape[0], dtype=torch.bfloat16, **make)]
    found = scratch(operator, arguments, scales, result, None)
    assert [size for early in found for size in early] == taken
    assert bound_bytes(operator, arguments, scales, result) == bound


@needs("bitsandbytes")
def test_8_bits_that_look_at_numbers_are_refused():
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True)
    options = {"quantization_config": config, "device_map": {"": 0}, "dtype": torch.float16}
    with Rig.simulated("L4"), pytest.raises(ValueError, match="Use its 4 bits, or 8 bits of tor"):
        AutoModelForCausalLM.from_pretrained(CHECKPOINT, **options)
