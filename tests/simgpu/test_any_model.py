"""The simulator knows no model: those of transformers load on a rig from a configuration alone."""

import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
)

from simgpu import Rig
from simgpu.allocator import block_bytes
from simgpu.checkpoints import register_config
from simgpu.loading import from_pretrained_replaced

SMALL = dict(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=1000,
    dtype="bfloat16",
)
LOADERS = [AutoModelForCausalLM, LlamaForCausalLM]


def directory_of(config, folder):
    """A checkpoint's directory with nothing in it but its configuration."""
    config.save_pretrained(folder)
    return folder


def bytes_of(tensors) -> int:
    return sum(
        {each.untyped_storage()._cdata: block_bytes(each.nbytes) for each in tensors}.values()
    )


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.__name__)
def test_a_llama_loads_over_two_cards_and_takes_the_bytes_of_its_weights(loader, tmp_path):
    source = directory_of(LlamaConfig(**SMALL), tmp_path)
    rig = Rig.simulated("L4", 2)
    with rig:
        model = loader.from_pretrained(source, device_map="auto")
    assert type(model) is LlamaForCausalLM
    assert {each.device.index for each in model.parameters()} == {0, 1}
    expected = [[], []]
    for tensor in (*model.parameters(), *model.buffers()):
        expected[tensor.device.index].append(tensor)
    assert [card.allocated_bytes for card in rig.memory()] == [bytes_of(each) for each in expected]
    # By hand: embedding and head, and per layer attention (q, k, v, o), MLP and two norms; a norm.
    width, inner, kept = 256, 512, 128
    layer = 2 * width * width + 2 * width * kept + 3 * width * inner + 2 * width
    assert sum(each.nbytes for each in model.parameters()) == 2 * (
        2 * 1000 * width + 4 * layer + width
    )
    assert [stage.name for stage in rig.stages] == ["load"]


def test_a_model_with_a_loader_of_its_own_may_be_written_inside_the_block(tmp_path):
    source = directory_of(LlamaConfig(**SMALL), tmp_path)
    rig = Rig.simulated("L4")
    with rig:

        class Careful(LlamaForCausalLM):
            @classmethod
            def from_pretrained(cls, directory, **options):
                if directory:  # not the simulator's own call, which brings the tensors
                    raise FileNotFoundError(f"{directory} holds no weights")
                return super().from_pretrained(directory, **options)

        assert Careful.from_pretrained(source, device_map={"": 0}).device.index == 0
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        Careful.from_pretrained(source)


def test_a_llama_runs_and_trains_on_a_rig(tmp_path):
    source = directory_of(LlamaConfig(**SMALL), tmp_path)
    rig = Rig.simulated("L4", 2)
    with rig:
        model = AutoModelForCausalLM.from_pretrained(source, device_map="auto")
        prompt = torch.randint(1000, (2, 16), device="cuda:0")
        with torch.no_grad():
            outputs = model(prompt, use_cache=True)
        assert outputs.logits.shape == (2, 16, 1000)
        # Keys and values of 16 positions, in four layers of two heads with 64 features each.
        cache = [block for card in (0, 1) for block in rig.blocks(card)]
        found = sum(block.bytes for block in cache if block.purpose == "KV cache")
        assert found == 2 * 2 * 16 * 4 * 2 * 64 * 2
        model(prompt, labels=prompt, use_cache=False).loss.backward()
        assert all(each.grad.device == each.device for each in model.parameters())


def test_tied_weights_are_there_once(tmp_path):
    source = directory_of(LlamaConfig(**SMALL, tie_word_embeddings=True), tmp_path)
    rig = Rig.simulated("L4")
    with rig:
        model = AutoModelForCausalLM.from_pretrained(source, device_map={"": 0})
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert rig.memory()[0].allocated_bytes == bytes_of([*model.parameters(), *model.buffers()])


def test_experts_are_merged_as_the_loader_does_it(tmp_path):
    source = directory_of(MixtralConfig(**SMALL, num_local_experts=4), tmp_path)
    rig = Rig.simulated("L4")
    with rig:
        model = AutoModelForCausalLM.from_pretrained(source, device_map={"": 0})
    assert rig.memory()[0].allocated_bytes == bytes_of([*model.parameters(), *model.buffers()])


def test_a_card_that_is_full_while_experts_are_merged_is_out_of_memory(tmp_path):
    sizes = SMALL | {"intermediate_size": 2**16, "num_hidden_layers": 1}
    source = directory_of(MixtralConfig(**sizes, num_local_experts=8), tmp_path)
    with Rig.simulated("L4"), pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        torch.cuda.set_per_process_memory_fraction(0.05)
        AutoModelForCausalLM.from_pretrained(source, device_map={"": 0})


def test_numbers_that_are_not_floating_keep_their_type(tmp_path):
    config = BertConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    with Rig.simulated("L4"):
        model = AutoModelForSequenceClassification.from_pretrained(
            directory_of(config, tmp_path), device_map={"": 0}, dtype=torch.bfloat16
        )
    assert model.bert.embeddings.position_ids.dtype is torch.int64
    assert model.classifier.weight.dtype is torch.bfloat16


def test_a_registered_checkpoint_loads_by_its_name():
    register_config("somebody/small-llama", lambda: LlamaConfig(**SMALL))
    with Rig.simulated("L4"):
        model = AutoModelForCausalLM.from_pretrained("somebody/small-llama", device_map={"": 0})
    assert model.config.hidden_size == 256


def test_a_configuration_of_ones_own_is_taken(tmp_path):
    with Rig.simulated("L4"):
        model = AutoModelForCausalLM.from_pretrained(
            "nobody/nothing", config=LlamaConfig(**SMALL), device_map={"": 0}
        )
    assert model.config.hidden_size == 256


def test_a_checkpoint_that_is_not_on_this_machine_is_refused_with_what_to_do():
    with (
        Rig.simulated("L4"),
        pytest.raises(
            ValueError, match="no configuration. .*hf download no/such-model config.json"
        ),
    ):
        AutoModelForCausalLM.from_pretrained("no/such-model")


def test_a_model_of_another_kind_is_refused(tmp_path):
    source = directory_of(BertConfig(), tmp_path)
    with (
        Rig.simulated("L4"),
        pytest.raises(ValueError, match="AutoModelForCausalLM has no model for .*CLIPConfig"),
    ):
        text = json.dumps({"model_type": "clip"})
        (source / "config.json").write_text(text)
        AutoModelForCausalLM.from_pretrained(source)


def test_generate_of_any_model_never_assumes_a_token_that_ends_the_answer(tmp_path):
    source = directory_of(LlamaConfig(**SMALL | {"eos_token_id": [0, 1]}), tmp_path)
    with Rig.simulated("L4"):
        model = AutoModelForCausalLM.from_pretrained(source, device_map={"": 0})
        prompt = torch.zeros(2, 3, dtype=torch.int64, device="cuda")
        answer = model.generate(prompt, max_new_tokens=3, do_sample=False)
        assert answer[:, 3:].tolist() == [[2, 2, 2]] * 2


def test_a_real_model_is_loaded_and_generates_outside_the_block(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    model.save_pretrained(tmp_path)
    with Rig.simulated("L4"):
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": 0})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    prompt = torch.tensor([[5, 6, 7]])
    assert loaded.generate(prompt, max_new_tokens=2, do_sample=False).shape == (1, 5)
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == 256


def evil(**values):
    return {"model_type": "llama", "hidden_size": 64, **values}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            evil(model_type="unheard", auto_map={"AutoConfig": "mine.Config"}),
            "'unheard'.*never run",
        ),
        ({"hidden_size": 64}, "model_type None"),
        ([1], "is not a JSON object"),
        (evil(num_hidden_layers=10**9), "num_hidden_layers is 1,000,000,000"),
        (evil(num_labels=10**9), "num_labels is 1,000,000,000"),
        (
            {"model_type": "llava", "text_config": evil(num_hidden_layers=10**9)},
            "num_hidden_layers",
        ),
        (evil(hidden_size="wide"), "cannot be used.*'wide'"),
        (evil(dtype="wide"), "cannot be used.*'wide'"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, str) else "",
)
def test_a_stranger_s_configuration_is_refused_in_a_sentence_and_runs_nothing(
    content, said, tmp_path, monkeypatch
):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    (tmp_path / "mine.py").write_text("raise RuntimeError('ran')")
    (tmp_path / "config.json").write_text(json.dumps(content))
    with Rig.simulated("L4", 1), pytest.raises(ValueError, match=said) as raised:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(raised.value) and "\n" not in str(raised.value)


def test_nobody_is_asked_whether_code_may_run_on_capped_gpus_either(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    content = {"model_type": "unheard", "auto_map": {"AutoConfig": "mine.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(content))

    def as_it_is(original, cls, *args, **kwargs):
        return original(cls, *args, **kwargs)

    with from_pretrained_replaced(as_it_is), pytest.raises(ValueError, match="custom code"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
