"""Inside a rig: models from a configuration, adapters, opened files, cards that differ."""

import json

import pytest
import safetensors
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, core_model_loading

from simgpu import Rig

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
ADAPTER = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def base(tmp_path):
    LlamaConfig(**SMALL).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base, tmp_path):
    """The directory of an adapter: its configuration and nothing else."""
    directory = tmp_path / "adapter"
    directory.mkdir()
    content = ADAPTER | {"base_model_name_or_path": str(base)}
    (directory / "adapter_config.json").write_text(json.dumps(content))
    return directory


def adapted(model) -> list[torch.nn.Parameter]:
    return [each for name, each in model.named_parameters() if "lora_" in name]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_loads_from_its_configuration_alone_however_it_is_asked_for(base, adapter):
    def load():
        return AutoModelForCausalLM.from_pretrained(base, device_map="auto")

    ways = {
        "peft": lambda: PeftModel.from_pretrained(load(), adapter),
        "get_peft_model": lambda: get_peft_model(load(), LoraConfig(**ADAPTER)),
        "its directory": lambda: AutoModelForCausalLM.from_pretrained(adapter, device_map="auto"),
    }
    for name, make in ways.items():
        with Rig.simulated("L4"):
            model = make()
            shapes = [tuple(each.shape) for each in adapted(model)]
            assert shapes == [(4, 64), (64, 4)] * 2, name
            assert {each.device.type for each in model.parameters()} == {"cuda"}
            model(torch.zeros(1, 3, dtype=torch.long, device="cuda"))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_with_weights_is_read_and_put_on_the_card(base, tmp_path):
    real = get_peft_model(LlamaForCausalLM(LlamaConfig(**SMALL)), LoraConfig(**ADAPTER))
    real.save_pretrained(tmp_path / "trained")
    with Rig.simulated("L4"):
        model = AutoModelForCausalLM.from_pretrained(base, device_map="auto")
        model = PeftModel.from_pretrained(model, tmp_path / "trained")
        assert {each.device.type for each in adapted(model)} == {"cuda"}


def test_a_file_of_safetensors_opened_for_a_card_gives_tensors_on_it(tmp_path):
    file = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.tensor([1, 2])}, file)
    with Rig.simulated("L4", 2) as rig:
        loaded = safetensors.torch.load_file(file, device="cuda:1")["a"]
        assert loaded.device == torch.device("cuda:1") and loaded.tolist() == [1, 2]
        assert rig.memory()[1].allocated_bytes == 512
        with safetensors.safe_open(file, "pt", device=0) as opened:
            assert opened.get_tensor("a").device.index == 0
        assert safetensors.torch.load_file(file)["a"].device.type == "cpu"
    assert type(safetensors.torch.load_file(file)["a"]) is torch.Tensor


def test_a_model_of_a_configuration_takes_no_memory_of_the_computer():
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_key_value_heads=8
    )
    with Rig.simulated("H200", 2) as rig:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        with pytest.raises(torch.OutOfMemoryError):  # 137 GB, had it been drawn
            model.to("cuda", torch.float32)
        assert rig.memory()[0].allocated_bytes > 100 * 2**30
    assert type(LlamaForCausalLM(LlamaConfig(**SMALL)).lm_head.weight) is torch.nn.Parameter


def test_an_out_of_memory_error_that_the_loader_makes_words_of_stays_one(base, monkeypatch):
    def fails(*arguments, **options):
        try:
            torch.empty(2**40, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError:
            raise RuntimeError("We encountered some issues during automatic conversion") from None

    monkeypatch.setattr(core_model_loading.WeightRenaming, "convert", fails)
    with (
        Rig.simulated("L4"),
        pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 1024.00 GiB"),
    ):
        AutoModelForCausalLM.from_pretrained(base, device_map="auto")


def test_cards_of_several_kinds_say_what_each_is_and_auto_fills_each_as_far_as_it_goes(base):
    cards = ["L4", "A100-80"]
    with Rig(cards) as rig:
        assert [torch.cuda.get_device_name(n) for n in (0, 1)] == [
            "NVIDIA L4",
            "NVIDIA A100-SXM4-80GB",
        ]
        assert [torch.cuda.get_device_properties(n).major for n in (0, 1)] == [8, 8]
        assert repr(rig).startswith("Rig(1 x NVIDIA L4, 1 x NVIDIA A100-SXM4-80GB, simulated")
        assert [memory.card for memory in rig.memory()] == cards
    with pytest.raises(ValueError, match="count is 3, but card is a list of 2"):
        Rig(cards, 3)


def test_what_others_use_of_a_card_is_free_nowhere(base):
    with Rig("L4", 2, free_gib=[20, 4]) as rig:
        free, total = torch.cuda.mem_get_info(1)
        assert free < 4 * 2**30 and total == rig.cards[1].total_bytes
        with pytest.raises(torch.OutOfMemoryError, match=r"GPU 1 .* 22.03 GiB of which 3\.7\d GiB"):
            torch.empty(5 * 2**30, dtype=torch.uint8, device="cuda:1")
        assert "L4: 4 GiB free" in rig.provenance
    with pytest.raises(ValueError, match="2 figures for 1 cards"):
        Rig("L4", free_gib=[1, 2])
    with pytest.raises(ValueError, match="at most the 22.03 GiB of NVIDIA L4"):
        Rig("L4", free_gib=23)
