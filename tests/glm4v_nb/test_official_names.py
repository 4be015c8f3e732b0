"""Official names in state dicts, adapters, device maps and skip lists; and what is refused."""

import itertools
import json
import warnings

import accelerate
import peft
import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, load_model, save_file
from trainer_arguments import quiet_arguments
from transformers import AutoConfig, AutoModelForCausalLM, Trainer

from glm4v_nb.model.official_names import modules_here, names_here


def official_weights(checkpoint) -> dict[str, torch.Tensor]:
    shards = [load_file(path) for path in sorted(checkpoint.glob("model*.safetensors"))]
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def assert_equal(model, other):
    theirs = other.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def test_every_tensor_of_an_official_checkpoint_has_its_place_here(checkpoint, model):
    names = [name for name in official_weights(checkpoint) if not name.endswith("inv_freq")]
    here = [each for name in names for each in names_here(name)]
    assert sorted(here) == sorted(model.state_dict())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("wrapper", [None, torch.nn.DataParallel])
def test_a_state_dict_with_official_names_is_loaded(checkpoint, load, strict, wrapper):
    model, changed = load(), official_weights(checkpoint)
    assert any(name.endswith("inv_freq") for name in changed)  # a buffer that nobody reads
    prefix = "module." if wrapper else ""
    changed = {f"{prefix}{name}": tensor + 1 for name, tensor in changed.items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outer = wrapper(model) if wrapper else model
    assert not any(outer.load_state_dict(changed, strict=strict))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] + 1), name


def test_a_state_dict_that_matches_nothing_is_refused_even_if_not_strict(load):
    with pytest.raises(ValueError, match=r"None of the 1 tensors .* 'gpt.wte.weight'.*prefix"):
        load().load_state_dict({"gpt.wte.weight": torch.zeros(1)}, strict=False)


def test_a_fused_projection_of_another_size_is_named(checkpoint, load):
    changed = official_weights(checkpoint)
    name = "transformer.encoder.layers.0.self_attention.query_key_value.weight"
    with pytest.raises(ValueError, match=r"126 rows; expected 128: those of queries, keys"):
        load().load_state_dict(changed | {name: changed[name][:-2]})


def test_a_state_dict_in_place_of_a_checkpoint_has_to_be_whole(load):
    config = load().config
    with pytest.raises(ValueError, match="state_dict has no values for 86 tensors"):
        type(load()).from_pretrained(None, config=config, state_dict={"a": torch.zeros(1)})


def test_accelerate_and_safetensors_save_every_tensor_and_load_it_again(load, tmp_path):
    """The loader leaves queries, keys and values in one storage, of which accelerate saves one."""
    accelerator, model = accelerate.Accelerator(cpu=True), load()
    with torch.no_grad():
        model.language_model.layers[1].self_attn.v_proj.weight += 1
    accelerator.save_model(model, str(tmp_path))
    model.config.save_pretrained(tmp_path)
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    again = load()
    load_model(again, tmp_path / "model.safetensors")
    assert_equal(again, model)


def rows(golden):
    return [{"input_ids": golden["text.input_ids"][0], "labels": golden["text.input_ids"][0]}] * 4


def trainer(model, folder, golden, **options):
    arguments = quiet_arguments(folder, 1, learning_rate=1e-2, **options)
    return Trainer(model, arguments, train_dataset=rows(golden), eval_dataset=rows(golden))


def test_training_goes_on_from_the_weights_it_saved(load, golden, tmp_path):
    first = load()
    trainer(first, tmp_path, golden, max_steps=2, save_steps=2).train()
    again = load()
    trainer(again, tmp_path, golden, max_steps=2, save_steps=9).train(resume_from_checkpoint=True)
    assert_equal(again, first)


@pytest.mark.parametrize("shard_size", ["5GB", "50KB"])
def test_the_best_checkpoint_is_the_one_that_training_ends_with(
    load, golden, tmp_path, shard_size, monkeypatch
):
    model = load()
    save = model.save_pretrained
    monkeypatch.setattr(
        model,
        "save_pretrained",
        lambda folder, **options: save(folder, **options | {"max_shard_size": shard_size}),
    )
    losses = itertools.chain([1.0], itertools.repeat(2.0))  # the first step is the best

    def evaluate(*args, **kwargs):
        metrics = {"eval_loss": next(losses)}
        training.state.log_history.append(metrics)
        return metrics

    training = trainer(
        model,
        tmp_path,
        golden,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    training.evaluate = evaluate
    training.train()
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    assert_equal(model, best)


@pytest.mark.parametrize("targets", [["query_key_value"], None])
def test_lora_on_the_official_projection_reaches_decoder_and_tower(load, targets):
    model = get_peft_model(load(), LoraConfig(r=2, target_modules=targets))
    adapted = {name for name, _ in model.named_modules() if name.endswith(".lora_A")}
    config = model.get_base_model().config
    decoder = [name for name in adapted if "language_model" in name]
    tower = [name for name in adapted if "vision_tower" in name]
    assert len(decoder) == 3 * config.num_layers
    assert len(tower) == config.vision_config.num_hidden_layers


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": r".*encoder.*query_key_value"},
        {"target_modules": ["query_key_value"], "rank_pattern": {r".*query_key_value": 4}},
    ],
)
def test_a_pattern_of_official_names_is_refused_with_the_names_here(load, options):
    with pytest.raises(ValueError, match="official name 'query_key_value'.*q_proj"):
        get_peft_model(load(), LoraConfig(r=2, **options))


def test_every_field_of_peft_that_names_modules_takes_official_names(load):
    layer = "transformer.encoder.layers.0"
    config = LoraConfig(
        target_modules=[],
        target_parameters=[f"{layer}.mlp.dense_h_to_4h.weight"],
        rank_pattern={f"{layer}.mlp.dense_h_to_4h.weight": 4},
        trainable_token_indices={"word_embeddings": [1]},
    )
    trained = {
        name.removeprefix("base_model.model."): parameter.shape
        for name, parameter in get_peft_model(load(), config).named_parameters()
        if parameter.requires_grad
    }
    mlp, embedding = "language_model.layers.0.mlp.gate_up_proj", "language_model.embed_tokens"
    assert trained[f"{mlp}.lora_A.default.weight"][0] == 4
    assert f"{embedding}.token_adapter.trainable_tokens_delta.default" in trained
    assert len(trained) == 3

    names = ["query_key_value", "dense_4h_to_h"]
    scaled = get_peft_model(load(), IA3Config(target_modules=names, feedforward_modules=names[1:]))
    down = scaled.get_base_model().language_model.layers[0].mlp.down_proj
    assert down.is_feedforward


def test_a_method_of_peft_without_a_default_for_this_model_has_none_here(load):
    """Linear projections are no layer norms."""
    with pytest.raises(ValueError, match="specify `target_modules`"):
        get_peft_model(load(), LNTuningConfig(task_type="CAUSAL_LM"))


def test_an_adapter_of_the_official_implementation_computes_the_same(load, golden, tmp_path):
    config = load().config
    rank, hidden = 2, config.hidden_size
    rows_of_qkv = (
        config.num_attention_heads + 2 * config.multi_query_group_num
    ) * config.kv_channels
    torch.manual_seed(0)
    first, second = torch.randn(rank, hidden) * 0.1, torch.randn(rows_of_qkv, rank) * 0.1
    module = "transformer.encoder.layers.0.self_attention.query_key_value"
    prefix = f"base_model.model.{module}"
    adapter = {f"{prefix}.lora_A.weight": first, f"{prefix}.lora_B.weight": second}
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "task_type": "CAUSAL_LM"}
    settings |= {"target_modules": ["query_key_value"], "base_model_name_or_path": "elsewhere"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))

    model = load()
    expected = load()
    for room in (peft, peft.utils, peft.utils.save_and_load, peft.peft_model):
        other = get_peft_model(load(), LoraConfig(r=rank, target_modules=["query_key_value"]))
        room.set_peft_model_state_dict(model=other, peft_model_state_dict=dict(adapter))
        into = other.get_base_model().language_model.layers[0].self_attn.v_proj.lora_B["default"]
        assert torch.equal(into.weight, second[-into.weight.shape[0] :])

    with torch.no_grad():
        change = 2.0 * second @ first  # alpha / rank
        attention = expected.language_model.layers[0].self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        for projection, part in zip(
            parts, change.split([part.weight.shape[0] for part in parts]), strict=True
        ):
            projection.weight += part
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft names the other layers' adapters, which are new
            adapted = PeftModel.from_pretrained(model, tmp_path)
        ids = golden["text.input_ids"]
        torch.testing.assert_close(adapted(ids).logits, expected(ids).logits)


def test_a_device_map_with_official_names_places_the_modules_here(checkpoint, tmp_path):
    official = {
        "transformer.vision": "cpu",
        "transformer.embedding": "cpu",
        "transformer.rotary_pos_emb": "cpu",
        "transformer.encoder.layers": "cpu",
        "transformer.encoder.final_layernorm": "cpu",
        "transformer.output_layer": "disk",
    }
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, device_map=official, offload_folder=tmp_path
    )
    assert model.hf_device_map["lm_head"] == "disk"
    assert set(model.hf_device_map) <= {
        "vision_tower",
        "language_model.embed_tokens",
        "language_model.rotary_emb",
        "language_model.layers",
        "language_model.norm",
        "lm_head",
    }


@pytest.mark.parametrize(
    ("official", "here"),
    [
        (["output_layer"], ["lm_head"]),
        (["transformer.output_layer", "lm_head"], ["lm_head"]),
        (["transformer.vision"], ["vision_tower"]),
        (["vision", "q_proj"], ["vision_tower", "q_proj"]),
        (
            ["transformer.encoder.layers.1.mlp.dense_h_to_4h"],
            ["language_model.layers.1.mlp.gate_up_proj"],
        ),
        (["dense_4h_to_h"], ["down_proj", "dense_4h_to_h"]),
        (["self_attention.dense", "mlp.dense_4h_to_h"], ["self_attn.o_proj", "mlp.down_proj"]),
        (
            ["self_attention.query_key_value"],
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ),
        (["encoder.layers.2.mlp.dense_h_to_4h"], ["language_model.layers.2.mlp.gate_up_proj"]),
        (["vision.linear_proj.gate_proj"], ["vision_tower.linear_proj.gate_proj"]),
        (["attention.query_key_value", "mlp.fc1"], ["attention.query_key_value", "mlp.fc1"]),
    ],
)
def test_a_list_of_modules_is_read_in_official_names(official, here):
    assert modules_here(official) == here


@pytest.mark.parametrize(
    "loader",
    [
        load_checkpoint_and_dispatch,
        accelerate.load_checkpoint_in_model,
        accelerate.utils.load_checkpoint_in_model,
        accelerate.utils.modeling.load_checkpoint_in_model,
    ],
    ids=lambda loader: loader.__module__ + "." + loader.__name__,
)
def test_accelerates_own_loaders_are_refused_with_what_to_use(checkpoint, loader):
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint))
    with pytest.raises(ValueError, match=r"from_pretrained\(checkpoint, device_map="):
        loader(model, str(checkpoint), device_map={"": "cpu"})


def test_an_adapter_whose_names_are_not_found_is_not_loaded_as_zeros(load, tmp_path):
    adapted = get_peft_model(load(), LoraConfig(target_modules=["lm_head"]))
    adapted.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    load().load_adapter(tmp_path)
    names = {name.replace("lm_head", "elsewhere"): one for name, one in load_file(file).items()}
    save_file(names, file)
    with pytest.raises(ValueError, match=r"no values for 2 of its weights.*'lm_head.*PeftModel"):
        load().load_adapter(tmp_path)


def test_other_models_keep_the_loaders_of_peft_and_accelerate(tmp_path):
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
    config = AutoConfig.for_model("llama", num_attention_heads=2, num_key_value_heads=2, **tiny)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(config)
    loaded = load_checkpoint_and_dispatch(empty, str(tmp_path), device_map={"": "cpu"})
    assert_equal(loaded, model)
    with pytest.raises(ValueError, match="query_key_value"):
        get_peft_model(model, LoraConfig(target_modules=["query_key_value"]))
