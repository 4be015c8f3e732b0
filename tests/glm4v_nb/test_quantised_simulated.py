"""Quantised weights on simulated cards: the same calls, and the bytes that the libraries hold."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from glm4v_nb.cli import main
from glm4v_nb.fit import Deployment
from glm4v_nb.inference import load
from glm4v_nb.miniature import CHECKPOINT
from glm4v_nb.model.quantised_files import check_described, packed_shapes
from glm4v_nb.model.quantising import parts_of
from glm4v_nb.workload import Workload
from simgpu import Rig, fitting
from simgpu.limits import Edge, Trials, largest_batch, longest_context, recommend
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
    assert result.exact


@needs("bitsandbytes")
def test_adapters_learn_on_quantised_weights():
    sizes = {"images": 0, "text_tokens": 32, "new_tokens": 0}
    step = Workload(**sizes, train=True, trained="lora", gradient_checkpointing=True)
    peaks = {}
    for weights in (None, "nf4"):
        result = Deployment("L4", checkpoint=CHECKPOINT, weights=weights).fit(step)
        assert result.fits and result.exact
        peaks[weights] = result.devices[0].peak_allocated_bytes
    assert peaks["nf4"] < peaks[None]


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
    with pytest.raises(ValueError, match="expected trained=.lora.: packed weights stay"):
        Deployment("L4", checkpoint=CHECKPOINT, weights="nf4").check(
            Workload(train=True, new_tokens=0)
        )
    step = Workload(images=0, train=True, trained="lora", new_tokens=0)
    with pytest.raises(ValueError, match="whose products have no derivative"):
        Deployment("L4", checkpoint=CHECKPOINT, weights="int4").check(step)
    with pytest.raises(ValueError, match="keep is .'vision'., but no weights"):
        Deployment("L4", checkpoint=CHECKPOINT, keep=["vision"]).fit(SHORT)
    fast = Deployment("L4", checkpoint=CHECKPOINT, weights="nf4", decoding="fast")
    with pytest.raises(ValueError, match="weights 'nf4', which its kernels do not read"):
        fast.check(SHORT)  # before anything is loaded
    with pytest.raises(ValueError, match="puts all of the model on the CPU"):
        Deployment("L4", device_map={"": "cpu"}, checkpoint=CHECKPOINT, weights="nf4").check(SHORT)
    from transformers import LlamaConfig

    other = fitting.Deployment("L4", checkpoint=LlamaConfig(num_hidden_layers=1), weights="nf4")
    with pytest.raises(ValueError, match="the package of LlamaForCausalLM does not say how"):
        other.fit()


@pytest.mark.parametrize("weights", FORMATS)
def test_the_lines_that_the_search_for_limits_ends_in_load_the_same(weights):
    deployment = Deployment("L4", checkpoint=CHECKPOINT, weights=weights, keep=["vision"])
    trials, workload = Trials(deployment), replace(SHORT, batch_size=2)
    # To its end, at thousands of samples, the search takes longer than all else here.
    assert largest_batch(trials, workload, most=3) == Edge(3, "search")
    assert longest_context(trials, workload).limited_by == "model"
    code, names = recommend(trials, workload).code, {}
    with Rig.simulated("L4") as rig:
        exec(code, names)
        (card,) = rig.memory()
    assert card.allocated_bytes == trials.deployment.fit(workload).devices[0].weights_bytes
    assert len(parts_of(names["model"].vision_tower.layers[0].mlp.fc1.weight)) == 1


@needs("bitsandbytes")
def test_nothing_is_written_to_stderr_while_a_model_is_quantised_on_simulated_cards():
    """bitsandbytes has functions compiled as it is imported, which would be warned of."""
    program = f"""\
from simgpu import Rig
from glm4v_nb.inference import load
with Rig.simulated("L4"):
    load({str(CHECKPOINT)!r}, weights="nf4", device_map={{"": 0}})
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


@needs("bitsandbytes")
def test_the_command_line_keeps_modules_as_they_are(capfd):
    options = ["--model", str(CHECKPOINT), "--card", "L4", "--new-tokens", "1", "--json"]
    found = []
    for keep in ([], ["--keep", "output_layer,vision"]):
        assert main(["fit", *options, "--weights", "nf4", *keep]) == 0
        (device,) = json.loads(capfd.readouterr().out)["devices"]
        found.append(device["weights_bytes"])
    assert found[1] > found[0] + MIB  # the tower has 2,179,072 numbers in matrices
    assert main(["fit", *options, "--keep", "vision"]) == 2
    assert "no weights are quantised" in capfd.readouterr().err


@needs("bitsandbytes")
@pytest.mark.parametrize(
    ("card", "rows", "shape", "packed"),
    [
        # Decoding: the kernel reads the 4 bits.
        ("H100", 1, [13696, 4096], True),
        # Between few rows and many the library chooses by card and shape.
        ("H100", 24, [27392, 4096], True),
        ("H100", 24, [256, 4096], True),
        ("H100", 24, [4096, 4096], False),
        ("T4", 24, [4096, 4096], False),
        ("H100", 100, [27392, 4096], False),
        ("L4", 100, [27392, 4096], True),
        ("H100", 600, [13696, 4096], False),
        # A prompt with an image.
        ("H100", 1634, [256, 4096], False),
        ("L4", 1634, [256, 4096], False),
        # A row is no whole number of blocks.
        ("H100", 1, [256, 100], False),
    ],
)
def test_few_bits_are_made_whole_before_a_product_of_many_rows(card, rows, shape, packed):
    import bitsandbytes  # noqa: F401  (defines the operator)

    blocks, numbers = -(-shape[0] * shape[1] // 64), shape[0] * shape[1]
    with Rig.simulated(card) as rig:
        bytes_ = {"dtype": torch.uint8, "device": "cuda"}
        activations = torch.empty(rows, shape[1], dtype=torch.bfloat16, device="cuda")
        weights = torch.empty(numbers // 2, 1, **bytes_)
        scales = torch.empty(blocks, **bytes_)
        nested = [torch.empty(size, device="cuda") for size in (-(-blocks // 256), 256)]
        offset = torch.zeros((), device="cuda")
        if not packed:  # cuBLAS's workspace is there from now on
            activations @ activations.T
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = torch.ops.bitsandbytes.gemm_4bit(
            activations,
            weights,
            shape,
            nested[0],
            64,
            "nf4",
            absmax_8bit=scales,
            absmax_code=nested[1],
            absmax_offset=offset,
        )
        taken = torch.cuda.max_memory_allocated() - before
        assert result.shape == (rows, shape[0])
        assert rig.exact
    # Scales in two steps, then the weights, and only then the result.
    sizes = [2 * rows * shape[0]] + ([] if packed else [4 * blocks, 4 * blocks, 2 * numbers])
    # Of a block of more than 1 MiB the allocator leaves up to 1 MiB unused.
    least = sum(-(-size // 512) * 512 for size in sizes)
    assert least <= taken <= least + MIB * sum(size > MIB for size in sizes)


@needs("bitsandbytes")
@pytest.mark.parametrize(("rows", "workspaces"), [(1, 0), (1634, 33 * MIB)])
def test_a_bias_is_added_by_cublaslt_where_weights_are_unpacked(rows, workspaces):
    """On an H100 cuBLAS has a workspace of 32 MiB and 8 KiB, and cublasLt one of 1 MiB."""
    import bitsandbytes  # noqa: F401  (defines the operator)

    with Rig.simulated("H100"):
        options = {"dtype": torch.bfloat16, "device": "cuda"}
        activations, bias = torch.empty(1, rows, 1024, **options), torch.empty(1024, **options)
        weights = torch.empty(2**19, 1, dtype=torch.uint8, device="cuda")
        scales, before = torch.empty(2**14, device="cuda"), torch.cuda.memory_allocated()
        result = torch.ops.bitsandbytes.gemm_4bit(
            activations, weights, [1024, 1024], scales, 64, "nf4", bias=bias
        )
        kept = torch.cuda.memory_allocated() - before - result.nbytes
    assert workspaces <= kept <= workspaces + MIB


@needs("bitsandbytes")
def test_8_bits_that_look_at_numbers_are_assumed_to_find_none_that_are_large():
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    options = {"quantization_config": config, "device_map": {"": 0}, "dtype": torch.float16}
    for assume in ("count", "refuse"):
        with Rig.simulated("L4", assume=assume) as rig:
            model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, **options)
            (card,) = rig.memory()
            ids = torch.ones((1, 4), dtype=torch.long, device="cuda")
            if assume == "refuse":
                with pytest.raises(RuntimeError, match="needs the numbers in a tensor"):
                    model(ids)
                return
            logits = model(ids).logits
            assert logits.shape[:2] == (1, 4)
            assert rig.assumed.keys() == {"item"}
            assert not rig.exact
            assert "at most" in rig.exactness and "int8_mixed_scaled_mm" in rig.exactness
        held = [part for tensor in model.parameters() for part in parts_of(tensor)]
        # What a product has seen is kept in its layer, no longer beside the weight.
        held += [module.state.SCB for module in model.modules() if hasattr(module, "state")]
        assert (
            0 <= card.allocated_bytes - in_blocks(each for each in held if each is not None) < 4096
        )


@needs("bitsandbytes")
def test_8_bits_are_made_whole_in_two_steps():
    """They are where an input has large numbers: multiplied by scales, and the product by 1/127."""
    import bitsandbytes  # noqa: F401  (defines the operator)

    with Rig.simulated("L4"):
        numbers = torch.empty(4096, 1024, dtype=torch.int8, device="cuda")
        scales = torch.empty(4096, device="cuda")
        before = torch.cuda.memory_allocated()
        result = torch.ops.bitsandbytes.int8_vectorwise_dequant(numbers, scales)
        assert result.dtype == torch.float32
        assert torch.cuda.memory_allocated() - before == result.nbytes
        assert torch.cuda.max_memory_allocated() - before == 2 * result.nbytes


@needs("bitsandbytes")
@pytest.mark.parametrize(
    ("rows", "shape"),
    # The decoder's gate and up in decoding, its down in a prompt; the tower's queries to values.
    [(1, [27392, 4096]), (600, [4096, 13696]), (6401, [5376, 1792])],
)
def test_the_bound_of_8_bits_holds_where_every_column_has_a_large_number(monkeypatch, rows, shape):
    from bitsandbytes import MatmulLtState, matmul

    from simgpu import quantised

    def peak(count):
        monkeypatch.setattr(
            quantised, "_columns_of", lambda large: large.new_empty(count, dtype=torch.int64)
        )
        with Rig.simulated("H100", assume="count") as rig:
            state = MatmulLtState()
            state.has_fp16_weights = False
            state.CB = torch.empty(shape, dtype=torch.int8, device="cuda")
            state.SCB = torch.empty(shape[0], device="cuda")
            activations = torch.empty(rows, shape[1], dtype=torch.bfloat16, device="cuda")
            matmul(activations, state.CB, state=state, threshold=6.0)
            (bound,) = rig.unmodelled.values()
            return torch.cuda.max_memory_allocated(), bound

    (none, bound), (every, same) = peak(0), peak(shape[1])
    assert bound == same
    assert none < every <= none + bound
    if rows == 1:  # where nothing else is large at the same time
        assert every > none + 0.99 * bound - 2**25  # the workspace may be below the peak
