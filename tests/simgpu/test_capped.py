"""``Rig`` on a machine with GPUs, which are faked here: which door it opens, and what a cap does to
torch.cuda."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from transformers import AutoModelForCausalLM

from glm4v_nb.miniature import CHECKPOINT
from glm4v_nb.workload import Workload, make_prompt, prefill
from simgpu import Rig, device, find_card
from simgpu import loading as patches
from simgpu.capped import CappedRig
from simgpu.readings import MachineReadings
from simgpu.simulated import SimulatedRig

H100, L4 = find_card("H100"), find_card("L4")


class Gpus:
    """Stands for torch.cuda's functions on a machine with these cards."""

    def __init__(self, *names):
        self.cards = [find_card(name) for name in names]
        self.reserved = [0] * len(names)
        self.fractions = {}

    def install(self, patch):
        for name, answer in {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "device_count": lambda: len(self.cards),
            "get_device_name": lambda index=0: self.cards[index].device_name,
            "get_device_properties": lambda index=0: SimpleNamespace(
                name=self.cards[index].device_name,
                total_memory=self.cards[index].total_bytes,
                uuid="none",
            ),
            "mem_get_info": self.mem_get_info,
            "set_per_process_memory_fraction": self.set_fraction,
            "reset_peak_memory_stats": lambda index: None,
            **{
                name: lambda index=0: self.reserved[index]
                for name in (
                    "memory_allocated",
                    "memory_reserved",
                    "max_memory_allocated",
                    "max_memory_reserved",
                )
            },
        }.items():
            patch.setattr(torch.cuda, name, answer)
        return self

    def mem_get_info(self, index=0):
        card = self.cards[index]
        return card.total_bytes - card.context_bytes - self.reserved[index], card.total_bytes

    def set_fraction(self, fraction, index=0):
        self.fractions[index] = fraction


@pytest.fixture
def machine(monkeypatch):
    return lambda *names: Gpus(*names).install(monkeypatch)


def test_without_gpus_the_cards_are_simulated_and_nothing_is_said_of_a_reason():
    assert isinstance(Rig("L4", 2), SimulatedRig)
    assert Rig("L4", 2).provenance == "simulated"


def test_with_enough_gpus_they_are_used_and_capped_and_every_figure_says_so(machine):
    machine("H100", "H100")
    rig = Rig("L4", 2)
    assert isinstance(rig, CappedRig)
    assert (
        "measured on 2 x NVIDIA H100 80GB HBM3 capped to 21.79 GiB, as an NVIDIA L4, "
        in rig.provenance
    )


def test_every_kind_of_rig_is_a_rig_and_only_simulated_ones_take_more_options(machine):
    assert all(isinstance(rig, Rig) for rig in (Rig("L4"), Rig.simulated("L4"), Rig.here()))
    machine("H100")
    assert isinstance(Rig("L4"), CappedRig) and isinstance(Rig("L4"), Rig)
    with pytest.raises(TypeError, match="a card and a count.*Rig.simulated"):
        Rig("L4", 1, "expandable_segments:True")


def test_asked_for_more_cards_than_there_are_it_says_so_and_simulates(machine):
    machine("H100")
    rig = Rig("L4", 2)
    assert isinstance(rig, SimulatedRig)
    assert rig.provenance == "simulated (this machine has 1 GPU, not 2)"


def test_asked_for_a_larger_card_than_there_is_it_says_so_and_simulates(machine):
    machine("L4")
    assert Rig("H100").provenance == (
        "simulated (GPU 0 of this machine, NVIDIA L4, is smaller than an NVIDIA H100 80GB HBM3)"
    )


def test_simulation_can_be_forced_on_a_machine_with_gpus(machine):
    machine("H100", "H100")
    assert isinstance(Rig.simulated("L4", 2), SimulatedRig)


def test_unknown_cards_and_impossible_counts_are_refused_with_gpus_too(machine):
    machine("H100")
    with pytest.raises(ValueError, match="not in the catalogue"):
        Rig("L5")
    with pytest.raises(ValueError, match="count is 0"):
        Rig("L4", 0)


def test_in_its_block_torch_counts_and_sizes_the_cards_that_were_asked_for(machine):
    gpus = machine("H100", "H100", "H100")
    gpus.reserved = [5 * 2**30, 0, 0]
    with Rig("L4", 2):
        assert torch.cuda.device_count() == 2
        expected = L4.total_bytes - L4.context_bytes - L4.system_bytes
        assert torch.cuda.mem_get_info(1) == (expected, L4.total_bytes)
        assert torch.cuda.mem_get_info() == (expected - 5 * 2**30, L4.total_bytes)
        assert torch.cuda.mem_get_info("cuda:1") == (expected, L4.total_bytes)
    assert torch.cuda.device_count() == 3
    assert torch.cuda.mem_get_info(1)[1] == H100.total_bytes


def test_pytorch_may_reserve_what_it_could_on_the_card_and_the_cap_ends_with_the_block(machine):
    gpus = machine("H100", "H100")
    with Rig("L4", 1) as rig:
        assert list(gpus.fractions) == [0]
        assert int(gpus.fractions[0] * H100.total_bytes) == pytest.approx(rig.cap_bytes, abs=1)
        # The same bytes a simulated L4 has to give.
        assert rig.cap_bytes == Rig.simulated("L4").allocators[0].limit_bytes
    assert gpus.fractions == {0: 1.0}


def test_the_cap_ends_also_after_an_error(machine):
    gpus = machine("H100")
    with pytest.raises(torch.OutOfMemoryError), Rig("L4"):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert gpus.fractions == {0: 1.0}
    with Rig("L4"):
        pass


def test_a_gpu_of_the_kind_asked_for_is_used_as_it_is(machine):
    gpus = machine("H100")
    with Rig("H100") as rig:
        assert gpus.fractions == {}
        assert torch.cuda.mem_get_info(0) == gpus.mem_get_info(0)
    assert "capped" not in rig.provenance


def test_memory_and_stages_are_those_of_the_capped_cards(machine):
    gpus = machine("H100", "H100")
    with Rig("L4", 2) as rig:
        with rig.stage("load"):
            gpus.reserved = [2**30, 2**31]
        assert [memory.allocated_bytes for memory in rig.stages[0].memory] == [2**30, 2**31]
        assert [memory.card for memory in rig.memory()] == ["L4", "L4"]
        assert [memory.capacity_bytes for memory in rig.memory()] == [L4.total_bytes] * 2
        assert rig.memory()[1].free_bytes == torch.cuda.mem_get_info(1)[0]


def test_two_rigs_cannot_stand_for_torch_cuda_at_a_time(machine):
    machine("H100")
    with Rig("L4") as rig:
        for other in (rig, Rig.simulated("T4")):
            with pytest.raises(RuntimeError, match="is active already"), other:
                pass
    with Rig.simulated("T4"):
        pass


def test_a_rig_made_inside_simulated_cards_is_simulated(machine):
    machine("H100")
    with Rig.simulated("T4"):
        assert isinstance(Rig("L4"), SimulatedRig)


def test_the_monitor_sees_the_capped_cards(machine):
    gpus = machine("H100", "H100")
    with Rig("L4", 2) as rig:
        gpus.reserved = [2**30, 0]
        found = MachineReadings(rig).read()
    assert [(card["card"], card["capacity_bytes"]) for card in found] == [
        ("L4", L4.total_bytes)
    ] * 2


@pytest.mark.parametrize(
    ("text", "kind", "limit"),
    [
        ("", "Allocator", None),
        ("expandable_segments:True", "ExpandableAllocator", None),
        ("expandable_segments:False, max_split_size_mb:128", "Allocator", 128 * 2**20),
    ],
)
def test_the_allocators_configuration_is_an_option_or_comes_from_the_environment(
    text, kind, limit, monkeypatch
):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", text)
    for rig in (Rig.simulated("L4"), Rig("L4"), Rig.simulated("L4", alloc_conf=text)):
        assert type(rig.allocators[0]).__name__ == kind
        assert rig.allocators[0].max_split_bytes == (limit or 2**63)


@pytest.mark.parametrize(
    "text",
    ["garbage_collection_threshold:0.8", "max_split_size_mb:many", "expandable_segments:yes"],
)
def test_a_configuration_that_is_not_simulated_is_refused(text):
    with pytest.raises(ValueError, match="is not simulated; expected expandable_segments:True"):
        Rig.simulated("L4", alloc_conf=text)


@pytest.fixture
def gpu_is_the_cpu(monkeypatch):
    """A machine with GPUs, as far as bare numbers are concerned: tensors for any GPU are made on
    the CPU."""

    def machine_device(index):
        return torch.device("cpu") if device._observer is None else None

    monkeypatch.setattr(device, "machine_device", machine_device)
    monkeypatch.setattr(patches, "machine_device", machine_device)


def test_a_bare_number_is_a_gpu_again_after_cards_were_simulated(gpu_is_the_cpu):
    with Rig.simulated("L4"):
        assert device.on_card(torch.zeros(1, device=0))
    ones = torch.ones(2, 3)
    for tensor in (
        torch.full((2, 3), 1.0, device=0),
        ones.to(0),
        ones.T.to(0).T,
        torch.ones_like(ones, device=0),
    ):
        assert tensor.device.type == "cpu"
        assert tensor.tolist() == ones.tolist()
    with Rig.simulated("L4"):
        assert device.on_card(torch.zeros(1, device=0))


def test_weights_loaded_by_number_after_a_simulation_are_real(gpu_is_the_cpu, monkeypatch):
    with Rig.simulated("A100-80"):
        AutoModelForCausalLM.from_pretrained("zai-org/glm-4v-9b", device_map="auto")
    warmed = set()
    monkeypatch.setattr(
        patches, "_ORIGINAL_WARMUP", lambda _, devices, *others: warmed.update(devices.values())
    )
    loaded, expected = (
        AutoModelForCausalLM.from_pretrained(CHECKPOINT, device_map=where).state_dict()
        for where in ({"": 0}, None)
    )
    assert warmed == {torch.device("cuda", 0)}, (
        "the loader sizes its first block by what this GPU has free"
    )
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


TWO_GPUS = {"vision_tower": 1, "language_model": 0, "lm_head": 1}


def test_hooks_of_accelerate_mean_a_gpu_by_a_number_again_those_from_before_as_well(gpu_is_the_cpu):
    early, named = AlignDevicesHook(execution_device=1), AlignDevicesHook(execution_device="disk")
    with Rig.simulated("L4", 2):
        assert early.execution_device == 1
    for hook in (early, AlignDevicesHook(execution_device=1)):
        assert hook.execution_device == torch.device("cpu")
    assert named.execution_device == "disk"
    assert copy.deepcopy(early).execution_device == torch.device("cpu")
    assert not hasattr(AlignDevicesHook.__new__(AlignDevicesHook), "execution_device")


def test_weights_spread_by_number_after_a_simulation_are_real(gpu_is_the_cpu, monkeypatch):
    with Rig.simulated("L4"):
        pass
    monkeypatch.setattr(patches, "_ORIGINAL_WARMUP", lambda *arguments: None)
    spread, whole = (
        AutoModelForCausalLM.from_pretrained(CHECKPOINT, device_map=where).eval()
        for where in (TWO_GPUS, None)
    )
    for name, tensor in whole.state_dict().items():
        assert torch.equal(spread.state_dict()[name], tensor), name
    logits = [
        prefill(model, make_prompt(model, Workload(text_tokens=8))).logits
        for model in (spread, whole)
    ]
    assert torch.equal(*logits)
