"""Simulated cards: the reader's own code runs, every byte is counted, and leaving restores
everything."""

import copy
import gc
import itertools

import accelerate.hooks
import pytest
import torch
import transformers.masking_utils
import transformers.modeling_utils
from accelerate.utils import find_executable_batch_size
from rig_fixtures import GIB, GOLDEN, MIB, OFFICIAL, counters, load, split_in_two, write_config
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import is_torch_cuda_available

from glm4v_nb.model import GLM4VForConditionalGeneration
from glm4v_nb.training import enable_gradient_checkpointing, train_step
from glm4v_nb.workload import Workload, decode, make_prompt, prefill
from simgpu import Rig, find_card
from simgpu.allocator import block_bytes
from simgpu.oom import parse_out_of_memory

WEIGHT_BYTES = 27_812_641_792  # 13,906,320,896 parameters in bfloat16


@pytest.fixture
def rig():
    return Rig("L4", 2)


@pytest.fixture(scope="module")
def two_l4():
    """The full-size model on two L4, placed by accelerate. Tests leave it as it is, and workspaces
    of its matrix products beside it."""
    rig = Rig("L4", 2)
    with rig, rig.stage("load"):
        model = load(OFFICIAL)
    return rig, model


# --- torch.cuda inside the block and after it


def test_torch_cuda_shows_the_simulated_cards(rig):
    card = find_card("L4")
    with rig:
        assert torch.cuda.is_available()
        assert torch.cuda.device_count() == 2
        assert torch.cuda.get_device_name() == torch.cuda.get_device_name("cuda:1") == "NVIDIA L4"
        assert torch.cuda.get_device_capability(1) == (8, 9)
        properties = torch.cuda.get_device_properties("cuda:1")
        assert (properties.name, properties.total_memory) == ("NVIDIA L4", card.total_bytes)
        assert (properties.major, properties.minor, properties.multi_processor_count) == (8, 9, 58)
        assert torch.cuda.is_bf16_supported(including_emulation=False)
        assert torch.cuda.mem_get_info(0) == (
            card.total_bytes - card.context_bytes,
            card.total_bytes,
        )
        torch.cuda.synchronize()


def test_memory_functions_follow_a_tensor_from_birth_to_empty_cache(rig):
    with rig:
        free = torch.cuda.mem_get_info(1)[0]
        tensor = torch.zeros(3 * MIB, dtype=torch.uint8, device="cuda:1")
        assert torch.cuda.memory_allocated(1) == torch.cuda.memory_allocated("cuda:1") == 3 * MIB
        assert torch.cuda.memory_allocated() == torch.cuda.memory_allocated(0) == 0
        assert torch.cuda.memory_reserved(1) == 20 * MIB
        assert torch.cuda.mem_get_info(1)[0] == free - 20 * MIB
        del tensor
        assert torch.cuda.memory_allocated(1) == 0
        assert torch.cuda.max_memory_allocated(1) == 3 * MIB
        assert torch.cuda.memory_reserved(1) == torch.cuda.max_memory_reserved(1) == 20 * MIB
        torch.cuda.reset_peak_memory_stats(1)
        assert torch.cuda.max_memory_allocated(1) == 0
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved(1) == 0
        assert torch.cuda.mem_get_info(1)[0] == free


def test_set_device_changes_what_cuda_without_a_number_means(rig):
    with rig:
        torch.cuda.set_device(1)
        assert torch.cuda.current_device() == 1
        tensor = torch.zeros(1000, device="cuda")
        assert torch.cuda.memory_allocated() == torch.cuda.memory_allocated(1) == 4096
        assert tensor.device.index == 1


def test_a_question_about_a_device_that_is_no_card_is_refused_as_torch_does(rig):
    with rig, pytest.raises(ValueError, match="Expected a cuda device, but got: cpu"):
        torch.cuda.memory_allocated("cpu")


def world():
    """Everything a rig changes while it is active."""
    owners = (
        torch.cuda,
        torch.nn.functional,
        transformers.masking_utils,
        transformers.modeling_utils,
        accelerate.hooks,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        GLM4VForConditionalGeneration,
    )
    return (
        # transformers remembers on the class whether it has experts; that is its own.
        [
            {name: vars(owner)[name] for name in vars(owner) if not name.endswith("_cached_value")}
            for owner in owners
        ],
        torch.cuda.is_available(),
        torch.cuda.device_count(),
        torch._C._len_torch_function_stack(),
        torch.autograd.is_multithreading_enabled(),
        is_torch_cuda_available(),
    )


def test_leaving_the_block_restores_everything(rig):
    with rig:
        pass  # the first one makes the loader take bare numbers for CUDA devices for good
    before = world()
    with rig:
        assert world() != before
        assert is_torch_cuda_available()
        load()
    assert world() == before


def test_leaving_the_block_by_an_exception_restores_everything(rig):
    before = world()
    with pytest.raises(torch.OutOfMemoryError), rig:
        torch.zeros(30 * GIB, dtype=torch.uint8, device="cuda")
    with pytest.raises(KeyError, match="the reader's own"), rig:
        raise KeyError("the reader's own")
    with pytest.raises(ValueError), rig:
        load("no/such-model")
    assert world() == before


def test_what_is_on_the_cards_stays_between_blocks_until_its_owner_is_gone(rig):
    with rig:
        tensor = torch.zeros(MIB, device="cuda")
    assert rig.memory()[0].allocated_bytes == 4 * MIB
    with rig:
        assert torch.cuda.memory_allocated() == 4 * MIB
    del tensor
    assert rig.memory()[0].allocated_bytes == 0


def test_real_tensors_keep_their_numbers_inside_the_block(rig):
    with rig:
        assert (torch.arange(4) * 2).sum().item() == 12
        assert torch.nn.functional.softmax(torch.zeros(2), dim=0).tolist() == [0.5, 0.5]
    assert rig.memory()[0].allocated_bytes == 0


def test_a_rig_inside_a_rig_is_refused_and_the_outer_one_goes_on(rig):
    with rig:
        with (
            pytest.raises(RuntimeError, match=r"Rig\(2 x NVIDIA L4, simulated\) is active already"),
            Rig("T4"),
        ):
            pass
        assert torch.cuda.get_device_name() == "NVIDIA L4"
        torch.zeros(3, device="cuda")


def test_an_unknown_card_is_refused():
    with pytest.raises(ValueError, match="Did you mean"):
        Rig("RTX 4091")


@pytest.mark.parametrize("count", [0, -1, 17, 1.5, "2", None])
def test_an_impossible_number_of_cards_is_refused(count):
    with pytest.raises(ValueError, match="a rig has 1 to 16 cards"):
        Rig("L4", count)


# --- the reader's literal code

LITERAL = {
    'torch.zeros(3, device="cuda")': (0, lambda: torch.zeros(3, device="cuda")),
    'torch.zeros(3, device="cuda:1")': (1, lambda: torch.zeros(3, device="cuda:1")),
    "torch.zeros(3, device=1)": (1, lambda: torch.zeros(3, device=1)),
    'torch.zeros(3).to("cuda:1")': (1, lambda: torch.zeros(3).to("cuda:1")),
    'torch.zeros(3).to(device="cuda:1")': (1, lambda: torch.zeros(3).to(device="cuda:1")),
    "torch.zeros(3).to(1)": (1, lambda: torch.zeros(3).to(1)),
    'torch.zeros(3).to("cuda", torch.float16)': (
        0,
        lambda: torch.zeros(3).to("cuda", torch.float16),
    ),
    "torch.zeros(3).cuda()": (0, lambda: torch.zeros(3).cuda()),
    "torch.zeros(3).cuda(1)": (1, lambda: torch.zeros(3).cuda(1)),
    'torch.device("cuda:0")': (0, lambda: torch.zeros(3, device=torch.device("cuda:0"))),
    'torch.device("cuda", 1)': (1, lambda: torch.zeros(3).to(torch.device("cuda", 1))),
    'torch.tensor([1, 2], device="cuda")': (0, lambda: torch.tensor([1, 2], device="cuda")),
    'torch.randn(2, 2, device="cuda:1")': (1, lambda: torch.randn(2, 2, device="cuda:1")),
    'torch.full((2,), 7, device="cuda")': (0, lambda: torch.full((2,), 7, device="cuda")),
    'torch.arange(5, device="cuda")': (0, lambda: torch.arange(5, device="cuda")),
    "tensor.new_zeros(2)": (1, lambda: torch.zeros(3, device="cuda:1").new_zeros(2)),
    'nn.Linear(2, 2, device="cuda:1")': (1, lambda: torch.nn.Linear(2, 2, device="cuda:1").weight),
    "nn.Linear(2, 2).cuda()": (0, lambda: torch.nn.Linear(2, 2).cuda().weight),
    "nn.Linear(2, 2).cuda(1)": (1, lambda: torch.nn.Linear(2, 2).cuda(1).weight),
    'nn.Linear(2, 2).to("cuda:1")': (1, lambda: torch.nn.Linear(2, 2).to("cuda:1").weight),
}


@pytest.mark.parametrize("code", LITERAL)
def test_the_readers_literal_code_puts_a_tensor_on_the_card_it_names(rig, code):
    card, call = LITERAL[code]
    with rig:
        tensor = call()
        assert tensor.device.index == card
        assert torch.cuda.memory_allocated(card) >= 512
        assert torch.cuda.memory_allocated(1 - card) == 0
    del tensor


def test_a_block_under_torch_device_cuda_makes_its_tensors_on_the_card(rig):
    with rig:
        with torch.device("cuda"):
            tensor = torch.zeros(1024)
            layer = torch.nn.Linear(16, 16)
        assert tensor.device.index == layer.weight.device.index == 0
        assert torch.cuda.memory_allocated() == 4096 + 1024 + 512
        assert torch.zeros(3).device.type == "cpu"


def test_a_model_loaded_without_a_device_map_moves_to_a_card_as_a_whole(rig):
    with rig:
        model = AutoModelForCausalLM.from_pretrained(str(GOLDEN))
        assert torch.cuda.memory_allocated() == 0
        model = model.to("cuda")
        parameters = [*model.parameters(), *model.buffers()]
        assert {parameter.device.index for parameter in parameters} == {0}
        assert torch.cuda.memory_allocated() == sum(
            block_bytes(parameter.nbytes) for parameter in parameters
        )


@pytest.mark.parametrize(
    "use",
    [
        lambda: torch.zeros(3, device="cuda:2"),
        lambda: torch.zeros(3).to("cuda:2"),
        lambda: torch.zeros(3).cuda(2),
        lambda: torch.zeros(3, device=2),
        lambda: torch.cuda.memory_allocated(2),
        lambda: torch.cuda.set_device(2),
        lambda: load(device_map={"": 2}),
    ],
)
def test_a_card_that_is_not_there_is_an_invalid_device_ordinal(rig, use):
    with (
        rig,
        pytest.raises(
            RuntimeError, match="CUDA error: invalid device ordinal.*cuda:2.*2 simulated cards"
        ),
    ):
        use()
    assert [card.allocated_bytes for card in rig.memory()] == [0, 0]


@pytest.mark.parametrize(
    "mix",
    [
        lambda: torch.zeros(3, device="cuda:0") + torch.zeros(3, device="cuda:1"),
        lambda: torch.nn.Linear(3, 3).to("cuda:0")(torch.zeros(1, 3, device="cuda:1")),
        lambda: torch.cat((torch.zeros(3, device="cuda:0"), torch.zeros(3, device="cuda:1"))),
    ],
)
def test_tensors_of_two_cards_do_not_mix_and_the_error_is_the_genuine_one(rig, mix):
    with rig, pytest.raises(RuntimeError) as error:
        mix()
    assert (
        "Expected all tensors to be on the same device, but found at least two devices, cuda:"
        in str(error.value)
    )
    assert "simcuda" not in str(error.value)


def test_tensors_of_a_card_and_the_cpu_do_not_mix(rig):
    with rig, pytest.raises(RuntimeError, match="at least two devices, cuda:0 and cpu!"):
        torch.zeros(3, device="cuda") + torch.zeros(3)


@pytest.mark.parametrize(
    "read",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: tensor.tolist(),
        lambda tensor: bool((tensor > 0).any()),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: tensor.nonzero(),
    ],
)
def test_reading_numbers_that_are_not_there_says_so_and_what_to_do(rig, read):
    with (
        rig,
        pytest.raises(
            RuntimeError, match="tensors on simulated cards have none.*run this on a real device"
        ),
    ):
        read(torch.randn(3, device="cuda"))


def test_generate_goes_to_the_full_length_and_counts_the_tokens_it_assumed(rig):
    prompt = torch.tensor([[5, 6, 7]])
    with rig:
        model = load()
        answer = model.generate(prompt.to("cuda"), max_new_tokens=4, do_sample=False)
        assert answer.shape == (1, 7)
        assert answer[0, :3].tolist() == [5, 6, 7]
        assert rig.numbers.assumptions.made == {"argmax": 4}
        assert model.generate(prompt.to("cuda"), max_new_tokens=2, do_sample=True).shape == (1, 5)
        assert rig.numbers.assumptions.made == {"argmax": 4, "multinomial": 2}
    real = AutoModelForCausalLM.from_pretrained(GOLDEN, dtype=torch.float32)
    assert real.generate(prompt, max_new_tokens=2, do_sample=False).shape == (1, 5)
    with rig:
        assert real.generate(prompt, max_new_tokens=2, do_sample=False).shape == (1, 5), (
            "a real model still can"
        )


def test_remote_code_is_refused(rig):
    with rig, pytest.raises(ValueError, match="never runs remote code"):
        load(trust_remote_code=True)


# --- live bytes


def test_every_tensor_takes_a_multiple_of_512_bytes(rig):
    with rig:
        tensors = [torch.zeros(size, dtype=torch.uint8, device="cuda") for size in (1, 512, 513)]
        assert torch.cuda.memory_allocated() == 512 + 512 + 1024
        assert [block.bytes for block in rig.blocks(0)] == [1024, 512, 512]
    del tensors
    assert rig.blocks(0) == []


def test_views_and_further_references_cost_nothing_and_keep_the_storage_alive(rig):
    with rig:
        tensor = torch.zeros(64, 64, device="cuda")
        views = [
            tensor.view(-1),
            tensor[3],
            tensor.T,
            tensor.unsqueeze(0).expand(9, 64, 64),
            tensor.detach(),
            tensor,
        ]
        views += [
            tensor.reshape(32, 128),
            tensor.split(8)[1],
            tensor.contiguous(),
            tensor.to("cuda"),
        ]
        assert torch.cuda.memory_allocated() == 64 * 64 * 4
        del tensor
        assert torch.cuda.memory_allocated() == 64 * 64 * 4
        del views
        assert torch.cuda.memory_allocated() == 0


def test_working_in_place_costs_nothing(rig):
    with rig:
        tensor = torch.zeros(4096, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        tensor.add_(1).mul_(2).clamp_(0, 1)
        tensor += 3
        tensor.copy_(tensor)
        tensor[:5].zero_()
        assert torch.cuda.memory_allocated() == torch.cuda.max_memory_allocated() == 4096 * 4


def test_a_result_counts_while_its_operands_live_and_the_peak_remembers_it(rig):
    with rig:
        tensor = torch.zeros(MIB, device="cuda")
        tensor = tensor + 1
        assert torch.cuda.memory_allocated() == 4 * MIB
        assert torch.cuda.max_memory_allocated() == 8 * MIB


def test_a_copy_to_another_card_counts_there_and_the_original_stays(rig):
    with rig:
        first = torch.zeros(MIB, device="cuda:0")
        second = first.to("cuda:1")
        assert [card.allocated_bytes for card in rig.memory()] == [4 * MIB, 4 * MIB]
        assert (first.device.index, second.device.index) == (0, 1)


def test_gradients_count(rig):
    with rig:
        layer = torch.nn.Linear(1024, 1024, bias=False, device="cuda")
        layer(torch.zeros(1, 1024, device="cuda")).sum().backward()
        gc.collect()
        workspace = find_card("L4").cublas_workspace_bytes
        # The backward pass runs in a thread of its own, which has a workspace of its own.
        assert torch.cuda.memory_allocated() == 2 * 4 * MIB + 2 * workspace
        layer.zero_grad()
        assert torch.cuda.memory_allocated() == 4 * MIB + 2 * workspace


def test_resizing_a_storage_counts_the_new_size(rig):
    with rig:
        for start in (0, 128):
            tensor = torch.zeros(start, device="cuda")
            assert torch.cuda.memory_allocated() == 4 * start
            tensor.resize_(1024)
            assert torch.cuda.memory_allocated() == 4096
            del tensor
            assert torch.cuda.memory_allocated() == 0


@pytest.mark.parametrize("card", ["L4", "H100"])
def test_the_cublas_workspace_is_charged_once_per_card_at_its_first_matrix_product(card):
    rig = Rig(card, 2)
    workspace = find_card(card).cublas_workspace_bytes
    with rig:
        matrix = torch.zeros(16, 16, device="cuda:1")
        assert torch.cuda.memory_allocated(1) == 1024
        for _ in range(3):
            matrix @ matrix
            torch.nn.functional.linear(matrix, matrix)
        assert torch.cuda.memory_allocated(1) == 1024 + workspace
        assert torch.cuda.memory_allocated(0) == 0
        del matrix
        torch.cuda.empty_cache()
        assert torch.cuda.memory_allocated(1) == workspace, "PyTorch keeps it"
        assert [block.operator for block in rig.blocks(1)] == ["cuBLAS workspace"]


def test_a_workspace_that_found_no_room_is_charged_at_the_next_product(rig):
    with rig:
        matrix = torch.zeros(16, 16, device="cuda")
        room = torch.cuda.mem_get_info()[0] // (2 * MIB) * (2 * MIB)
        filler = torch.zeros(room, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            matrix @ matrix
        del filler
        matrix @ matrix
        assert torch.cuda.memory_allocated() == 1024 + find_card("L4").cublas_workspace_bytes


# --- out of memory


def test_running_out_of_memory_is_the_error_torch_raises_with_its_text_and_the_simulated_card(rig):
    assert torch.cuda.OutOfMemoryError is torch.OutOfMemoryError
    with rig, pytest.raises(torch.cuda.OutOfMemoryError) as error:
        kept = torch.zeros(20 * GIB, dtype=torch.uint8, device="cuda:1")
        torch.zeros(5 * GIB, dtype=torch.uint8, device="cuda:1")
    assert str(error.value).startswith(
        "CUDA out of memory. Tried to allocate 5.00 GiB. GPU 1 has a total capacity of 22.03 GiB of"
        " which 1.79 GiB is free. Including non-PyTorch memory, this process has 20.24 GiB memory"
        " in use. Of the allocated memory 20.00 GiB is allocated by PyTorch, and 0 bytes is"
        " reserved by PyTorch but unallocated."
    )
    assert str(error.value).endswith("[simulated NVIDIA L4]")
    assert parse_out_of_memory(error.value).device == 1
    del kept


def test_a_stage_keeps_its_peaks_and_the_error_that_ended_it(rig):
    with rig:
        with rig.stage("small"):
            torch.zeros(MIB, device="cuda")
        with pytest.raises(torch.OutOfMemoryError), rig.stage("large"):
            torch.zeros(30 * GIB, device="cuda")
    small, large = rig.stages
    assert (small.name, small.memory[0].peak_allocated_bytes, small.out_of_memory) == (
        "small",
        4 * MIB,
        None,
    )
    assert (large.name, large.memory[0].peak_allocated_bytes) == ("large", 0)
    assert "CUDA out of memory" in large.out_of_memory


def test_memory_is_back_once_the_exception_is_gone(rig):
    def run():
        held = [torch.zeros(GIB, dtype=torch.uint8, device="cuda")]
        while True:
            held.append(held[-1].clone())

    with rig:
        try:
            run()
        except torch.OutOfMemoryError:
            assert torch.cuda.memory_allocated() == 21 * GIB, "the traceback's frames hold it"
        assert torch.cuda.memory_allocated() == 0


def test_accelerate_finds_the_batch_size_that_fits(rig):
    tried, found_there = [], []

    @find_executable_batch_size(starting_batch_size=32)
    def run(batch_size):
        tried.append(batch_size)
        found_there.append(torch.cuda.memory_allocated())
        mine = torch.zeros(1, GIB, dtype=torch.uint8, device="cuda")
        rest = torch.zeros(batch_size - 1, GIB, dtype=torch.uint8, device="cuda")
        return len(mine) + len(rest)

    with rig:
        found = run()
    assert tried[0] == 32 and tried[-1] == found
    assert found <= 21 < tried[-2]
    assert set(found_there) == {0}, "no try finds anything of the one before it"


def test_a_process_fraction_is_the_limit_and_the_message_says_so(rig):
    with rig:
        torch.cuda.set_per_process_memory_fraction(0.5, 1)
        with pytest.raises(torch.OutOfMemoryError, match="11.02 GiB allowed; Of the allocated"):
            torch.zeros(12 * GIB, dtype=torch.uint8, device="cuda:1")
        torch.zeros(12 * GIB, dtype=torch.uint8, device="cuda:0")


# --- the full-size model


def test_the_full_size_model_takes_27_8_gb_plus_rounding_over_the_two_cards(two_l4):
    rig, model = two_l4
    parameters = list(model.parameters())
    assert sum(parameter.nbytes for parameter in parameters) == WEIGHT_BYTES
    expected = [0, 0]
    for tensor in (*parameters, *model.buffers()):
        expected[tensor.device.index] += block_bytes(tensor.nbytes)
    assert [card.allocated_bytes for card in rig.stages[0].memory] == expected
    # Every parameter of this size is a multiple of 512 bytes but the rotary frequencies' 128 or so.
    assert WEIGHT_BYTES < sum(expected) < WEIGHT_BYTES + 64 * 1024


def test_auto_balances_keeps_inside_the_cards_and_puts_the_tower_first(two_l4):
    rig, model = two_l4
    assert set(model.hf_device_map.values()) == {0, 1}
    first, second = (card.allocated_bytes for card in rig.memory())
    # accelerate aims at halves, give or take one and a quarter of the largest block (0.38 GiB) and
    # the head.
    assert abs(first - second) < 2 * GIB
    assert all(card.allocated_bytes < card.capacity_bytes for card in rig.memory())
    assert {parameter.device.index for parameter in model.vision_tower.parameters()} == {0}
    assert model.lm_head.weight.device.index == 1


@pytest.mark.parametrize("strategy", ["balanced", "balanced_low_0", "sequential"])
def test_no_strategy_splits_a_block(strategy):
    with Rig("L4", 4):
        model = load(OFFICIAL, device_map=strategy)
    blocks = [
        module for module in model.modules() if type(module).__name__ in model._no_split_modules
    ]
    assert len(blocks) == 63 + 40 + 3
    for block in blocks:
        assert len({parameter.device for parameter in block.parameters()}) == 1
    used = {parameter.device.index for parameter in model.parameters()}
    # "balanced_low_0" gives the other three enough for everything, and the first nothing.
    assert (
        used
        == {"balanced": {0, 1, 2, 3}, "balanced_low_0": {1, 2, 3}, "sequential": {0, 1}}[strategy]
    )


def test_one_card_is_too_small_in_bfloat16():
    rig = Rig("L4", 1)
    with rig, pytest.raises(torch.OutOfMemoryError, match="GPU 0"):
        load(OFFICIAL, device_map={"": 0})
    assert rig.stages[-1].name == "load"
    gc.collect()
    assert rig.memory()[0].allocated_bytes == 0


def test_prefill_gives_logits_on_the_last_card_and_a_cache_where_the_layers_are(two_l4):
    rig, model = two_l4
    with rig:
        prompt = make_prompt(model, Workload(text_tokens=8))
        outputs = prefill(model, prompt)
    assert outputs.logits.shape == (1, 1, 151552)
    layers = outputs.past_key_values.layers
    assert all(layer.keys.shape == (1, 2, 1610, 128) for layer in layers)
    for layer, decoder in zip(layers, model.language_model.layers, strict=True):
        assert layer.keys.device == decoder.mlp.down_proj.weight.device


def test_auto_offloads_to_the_cpu_when_one_card_is_too_small_and_prefill_and_decode_run():
    rig = Rig("L4", 1)
    with rig:
        model = load(OFFICIAL, max_memory={0: "20GiB", "cpu": "64GiB"})
        assert set(model.hf_device_map.values()) == {0, "cpu"}
        resident = torch.cuda.memory_allocated()
        assert resident < 20 * GIB
        torch.cuda.reset_peak_memory_stats()
        prompt = make_prompt(model, Workload(images=0, text_tokens=16))
        outputs = prefill(model, prompt)
        decode(rig, model, prompt, outputs, 2)
        # An offloaded block visits the card and leaves it; the head (1.16 GiB) is the largest
        # visitor.
        assert 1.1 * GIB < torch.cuda.max_memory_allocated() - resident < 1.5 * GIB
        del outputs, prompt
        gc.collect()
        # The projections of queries, keys and values have a bias, and their products a workspace in
        # addition.
        assert (
            torch.cuda.memory_allocated() - resident == find_card("L4").cublas_workspace_bytes + MIB
        )


# --- a decode replayed equals a decode run


class EveryStep:
    """Stands for a rig where every decode step is run."""

    def repeat(self, step, count):
        for _ in range(count):
            step()


@pytest.fixture(scope="module")
def tiny():
    """A tiny model on two cards, in float32."""
    rig = Rig("L4", 2)
    with rig:
        model = load(device_map=split_in_two(), dtype=torch.float32)
        warm = torch.zeros(2, 2)
        for card in range(2):
            warm.to(card) @ warm.to(card)  # the workspace, which stays
    return rig, model


def decoded(tiny, repeat, workload, room=None):
    """Counters of a rig after a decode, and again when its tensors are gone; and whether memory ran
    out.

    ``room`` is how many bytes the cards have left to reserve after the prefill.
    """
    rig, model = tiny
    with rig:
        prompt = make_prompt(model, workload)
        outputs = prefill(model, prompt)
        for card, allocator in enumerate(rig.allocators):
            torch.cuda.empty_cache()
            if room is not None:
                torch.cuda.set_per_process_memory_fraction(
                    (allocator.reserved + room + 1) / allocator.total_bytes, card
                )
            torch.cuda.reset_peak_memory_stats(card)
        failed = None
        try:
            decode(repeat, model, prompt, outputs, workload.new_tokens)
        except torch.OutOfMemoryError as error:
            failed = str(error)
        after = counters(rig)
        del outputs, prompt
        gone = counters(rig)
        for card in range(2):
            torch.cuda.set_per_process_memory_fraction(1.0, card)
    return after, gone, failed


@pytest.mark.parametrize(
    ("batch_size", "images", "text_tokens", "new_tokens"),
    [
        *((1, 1, 5, new_tokens) for new_tokens in (1, 2, 3, 4)),
        *((1, 0, text_tokens, 6) for text_tokens in (1, 31, 127)),
        *((batch_size, 1, 7, 6) for batch_size in (2, 3)),
        (5, 0, 60, 40),
    ],
)
def test_a_replayed_decode_counts_what_a_run_one_counts(
    tiny, batch_size, images, text_tokens, new_tokens
):
    workload = Workload(batch_size, images, text_tokens, new_tokens)
    replayed, run = decoded(tiny, tiny[0], workload), decoded(tiny, EveryStep(), workload)
    assert replayed == run
    assert replayed[2] is None


@pytest.mark.parametrize("room", [0, 2 * MIB, 4 * MIB, 20 * MIB, 24 * MIB])
def test_a_replayed_decode_runs_out_of_memory_where_a_run_one_does_and_leaves_the_same(tiny, room):
    workload = Workload(batch_size=200, images=0, text_tokens=20, new_tokens=100)
    replayed, run = (
        decoded(tiny, tiny[0], workload, room),
        decoded(tiny, EveryStep(), workload, room),
    )
    assert replayed == run
    assert "CUDA out of memory" in replayed[2]


def test_repeat_runs_every_step_when_the_steps_are_not_alike(rig):
    sizes = itertools.count(1)
    held = []

    def step():
        held.extend(torch.zeros(512, dtype=torch.uint8, device="cuda") for _ in range(next(sizes)))

    with rig:
        rig.repeat(step, 5)
        assert torch.cuda.memory_allocated() == 512 * (1 + 2 + 3 + 4 + 5)


def test_repeated_steps_that_keep_what_they_make_add_up_and_give_it_all_back(rig):
    kept = []
    with rig:
        rig.repeat(lambda: kept.append(torch.zeros(MIB, dtype=torch.uint8, device="cuda")), 10)
        assert torch.cuda.memory_allocated() == 10 * MIB
        kept.clear()
        assert torch.cuda.memory_allocated() == 0


def test_a_replay_that_runs_out_of_memory_after_giving_up_its_old_block_stays_consistent(rig):
    state = {"size": 0}

    def step():
        state.pop("tensor", None)
        state["size"] += GIB
        state["tensor"] = torch.zeros(state["size"], dtype=torch.uint8, device="cuda")

    with rig:
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 22.00 GiB"):
            rig.repeat(step, 40)
        assert torch.cuda.max_memory_allocated() == 21 * GIB
        assert torch.cuda.memory_allocated() == 0
        state.clear()
        assert torch.cuda.memory_allocated() == 0


def test_a_replay_that_runs_out_of_memory_keeps_what_was_on_the_card(rig):
    state = {"size": 0}

    def step():
        state["size"] += GIB
        state["tensor"] = torch.zeros(state["size"], dtype=torch.uint8, device="cuda")

    with rig:
        held = torch.zeros(3 * GIB, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError), rig.stage("decode"):
            rig.repeat(step, 40)
        assert held.shape in [block.shape for block in rig.stages[-1].blocks[0]]


def test_an_error_in_a_step_leaves_the_rig_usable(rig):
    def step():
        raise KeyError("mine")

    with rig:
        with pytest.raises(KeyError):
            rig.repeat(step, 5)
        tensor = torch.zeros(512, dtype=torch.uint8, device="cuda")
        assert torch.cuda.memory_allocated() == 512
        del tensor
        assert torch.cuda.memory_allocated() == 0


# --- activations


@pytest.fixture(scope="module")
def long_context(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("long") / "model", seq_length=16384)


def activation_peak(source, text_tokens, images, train=False):
    rig = Rig("L4", 1)
    with rig:
        model = load(source, device_map={"": 0})
        before = torch.cuda.memory_allocated()
        prompt = make_prompt(model, Workload(images=images, text_tokens=text_tokens))
        if train:
            train_step(model, prompt)
        else:
            prefill(model, prompt)
        return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("train", [False, True])
def test_activations_grow_with_the_length_and_not_with_its_square(long_context, images, train):
    # A mask of length x length would be 128 MB at the larger length, 60 times what one position's
    # features need.
    peaks = [activation_peak(long_context, length, images, train) for length in (4000, 8000)]
    workspace = find_card("L4").cublas_workspace_bytes
    assert 1.8 < (peaks[1] - workspace) / (peaks[0] - workspace) < 2.1


def test_gradient_checkpointing_lowers_the_peak_of_a_training_step_on_two_cards(tmp_path):
    source = write_config(
        tmp_path / "model", num_layers=12, hidden_size=256, ffn_hidden_size=1024, kv_channels=64
    )
    peaks = {}
    for checkpointing in (False, True):
        rig = Rig("L4", 2)
        with rig:
            model = load(source, device_map=split_in_two(12))
            prompt = make_prompt(model, Workload(batch_size=16, text_tokens=200))
            before = [card.allocated_bytes for card in rig.memory()]
            loss = train_step(model, prompt, gradient_checkpointing=checkpointing)
            assert loss.shape == ()
            assert all(
                parameter.grad is not None for parameter in model.language_model.parameters()
            )
            assert all(
                parameter.grad.device == parameter.device
                for parameter in model.parameters()
                if parameter.grad is not None
            )
        peaks[checkpointing] = [
            card.peak_allocated_bytes - start
            for card, start in zip(rig.memory(), before, strict=True)
        ]
    assert all(
        lower < 0.7 * higher for lower, higher in zip(peaks[True], peaks[False], strict=True)
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_running_out_of_memory_in_a_backward_pass_is_an_ordinary_error(tmp_path, checkpointing):
    source = write_config(tmp_path / "model", num_layers=6)
    rig = Rig("L4", 1)
    with rig:
        model = load(source, device_map={"": 0})
        prompt = make_prompt(model, Workload(batch_size=16, text_tokens=200))
        loss = None
        model.train()
        if checkpointing:
            enable_gradient_checkpointing(model)
        loss = model(**prompt, labels=prompt["input_ids"], use_cache=False).loss
        limit = torch.cuda.memory_allocated() + 64 * 1024
        torch.cuda.set_per_process_memory_fraction(limit / find_card("L4").total_bytes)
        torch.cuda.empty_cache()
        with pytest.raises(torch.OutOfMemoryError):
            loss.backward()
        torch.cuda.set_per_process_memory_fraction(1.0)
        del loss
        model.zero_grad()
        gc.collect()
        torch.zeros(GIB, device="cuda")


def test_a_copied_layer_is_a_second_set_of_weights(rig):
    with rig:
        layer = torch.nn.Linear(1024, 1024, bias=False, device="cuda")
        second = copy.deepcopy(layer)
        assert torch.cuda.memory_allocated() == 2 * 4 * MIB
        assert second.weight is not layer.weight
