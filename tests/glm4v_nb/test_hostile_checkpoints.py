"""A stranger's checkpoint is refused in one sentence that names the file, or it loads; nothing of
it runs, nothing of it is a pickle, and no size in it takes memory before the weights confirm it."""

import json
import os
import pickle
import shutil
import struct

import pytest
import torch
from damage import (
    FUSED,
    INDEX,
    WEIGHTS,
    Runs,
    edited,
    first_tensor,
    forbidden,
    header,
    indexed,
    refusal,
    vision,
    weights,
    written,
)
from transformers import PreTrainedModel

from glm4v_nb.inference import load

CODE = {"AutoModel": "mine.Model"}
TOKENIZER = "tokenizer_config.json"
REFUSED = {
    # code
    "a model of its own": (
        edited("config.json", model_type="unheard", auto_map={"AutoConfig": "mine.Config"}),
        ("config.json", "mine.Config", "never run"),
    ),
    "code beside our model": (edited("config.json", auto_map=CODE), ("mine.Model", "never run")),
    "code of another repository": (
        edited("config.json", auto_map={"AutoModel": "them/there--mine.Model"}),
        ("them/there--mine.Model", "never run"),
    ),
    "an auto_map that is text": (edited("config.json", auto_map="mine"), ("auto_map", "'mine'")),
    "a processor": (
        edited("processor_config.json", processor_class="Mine", auto_map={"AutoProcessor": "m.P"}),
        ("processor_config.json", "m.P", "never run"),
    ),
    "an image processor": (
        edited("preprocessor_config.json", auto_map={"AutoImageProcessor": "m.I"}),
        ("preprocessor_config.json", "m.I", "never run"),
    ),
    "a tokenizer": (
        edited(TOKENIZER, tokenizer_class="Mine", auto_map={"AutoTokenizer": ["m.T", None]}),
        (TOKENIZER, "m.T", "never run"),
    ),
    "an attention of the hub": (
        edited("config.json", _attn_implementation="them/kernel"),
        ("config.json", "them/kernel", '"sdpa" or "eager"'),
    ),
    "attention as an object": (
        edited("config.json", attn_implementation={"": "them/kernel"}),
        ("config.json", "them/kernel"),
    ),
    "a quantiser of the hub": (
        edited("config.json", quantization_config={"quant_method": "mxfp4"}),
        ("config.json", "quantization_config", "mxfp4"),
    ),
    "a quantiser's switch that is text": (
        edited(
            "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": "x"}
        ),
        ("config.json: quantization_config.load_in_8bit is 'x'",),
    ),
    "a quantiser that is text": (
        edited("config.json", quantization_config="int4"),
        ("config.json", "quantization_config", "'int4'"),
    ),
    "an adapter": (
        edited("adapter_config.json", base_model_name_or_path="them/base", peft_type="LORA"),
        ("adapter_config.json", "another checkpoint", "PeftModel.from_pretrained"),
    ),
    "search with constraints": (
        edited("generation_config.json", constraints=[{"a": 1}]),
        ("generation_config.json", "constraints"),
    ),
    # sizes
    "a huge vocabulary": (
        edited("config.json", padded_vocab_size=10**12),
        ("config.json", "10000"),
    ),
    "a large vocabulary": (
        edited("config.json", padded_vocab_size=2**23),
        ("(528, 64), expected (8388608, 64)", "config.json"),
    ),
    "huge layers": (edited("config.json", num_layers=10**9), ("config.json", "num_layers", "4096")),
    "many layers": (edited("config.json", num_layers=4000), ("4,003 layers", "lack tensors")),
    "no layers": (edited("config.json", num_layers=0), ("config.json", "num_layers is 0")),
    "huge hidden size": (edited("config.json", hidden_size=2**24), ("expected", "config.json")),
    "huge heads": (
        edited("config.json", num_attention_heads=2**24, kv_channels=2**24),
        ("other sizes than config.json",),
    ),
    "a negative size": (edited("config.json", ffn_hidden_size=-1), ("ffn_hidden_size is -1",)),
    "not a number": (
        edited("config.json", layernorm_epsilon=float("nan")),
        ("config.json: layernorm_epsilon is nan",),
    ),
    "groups that do not divide": (
        edited("config.json", multi_query_group_num=3),
        ("config.json", "multi_query_group_num 3"),
    ),
    "a huge image": (
        vision(image_size=28 * 40_000, num_positions=80_000**2 + 1),
        ("config.json, vision_config", "num_positions"),
    ),
    "a tower of text": (vision(patch_size="14"), ("vision_config: patch_size is '14'",)),
    "a huge processor": (
        edited("preprocessor_config.json", size=10**6),
        ("image size is 1000000", "config.json"),
    ),
    # types
    "a vision_config that is text": (
        edited("config.json", vision_config="large"),
        ("config.json", "vision_config is 'large'"),
    ),
    "another model_type": (
        edited("config.json", model_type="llama"),
        ("config.json", "'llama'", "'chatglm'"),
    ),
    "no model_type": (edited("config.json", model_type=[]), ("config.json", "'chatglm'")),
    "an unknown dtype": (
        edited("config.json", torch_dtype="bf16"),
        ("config.json: torch_dtype", "bf16"),
    ),
    "a dtype that is a list": (edited("config.json", dtype=[1]), ("config.json: dtype", "[1]")),
    "integers as dtype": (edited("config.json", dtype="int8"), ("config.json: dtype", "int8")),
    "an activation unheard of": (vision(hidden_act="mine"), ("hidden_act is 'mine'",)),
    "an id beyond the vocabulary": (
        edited("config.json", boi_token_id=528),
        ("boi_token_id is 528", "528"),
    ),
    "an id of another token": (
        edited("config.json", boi_token_id=520),
        ("[520, 523]", TOKENIZER, "[522, 523]"),
    ),
    "tokens that are a list": (
        edited(TOKENIZER, added_tokens_decoder=[1]),
        (TOKENIZER, "cannot be used"),
    ),
    "a token without text": (
        edited(TOKENIZER, "added_tokens_decoder", **{"512": {"content": 5}}),
        (TOKENIZER, "cannot be used"),
    ),
    "padding up": (edited(TOKENIZER, padding_side="up"), (TOKENIZER, "padding_side is 'up'")),
    "no padding": (edited(TOKENIZER, pad_token=None), (TOKENIZER, "pad_token is None")),
    "a length that is text": (
        edited(TOKENIZER, model_max_length="x"),
        ("model_max_length is 'x'",),
    ),
    "arguments for the tokenizer": (edited(TOKENIZER, init_inputs=5), (TOKENIZER,)),
    "colours of two numbers": (
        edited("preprocessor_config.json", size=56, image_mean=[0.5, 0.5]),
        ("preprocessor_config.json", "image_mean"),
    ),
    "no spread of colours": (
        edited("preprocessor_config.json", size=56, image_std=[0, 0, 0]),
        ("preprocessor_config.json", "image_std"),
    ),
    "an end that is text": (
        edited("generation_config.json", eos_token_id="end"),
        ("generation_config.json", "eos_token_id is 'end'"),
    ),
    "a negative end": (
        edited("generation_config.json", eos_token_id=-1),
        ("generation_config.json", "eos_token_id is -1"),
    ),
    "a billion beams": (
        edited("generation_config.json", num_beams=10**9),
        ("generation_config.json", "num_beams"),
    ),
    "half a vocabulary": (
        lambda folder: os.truncate(folder / "tokenizer.model", 1000),
        ("tokenizer.model", "Download the file again"),
    ),
    # weights
    "a pickle by name": (indexed("weights.bin"), (INDEX, "'weights.bin'", "pickle")),
    "one pickle among the shards": (
        indexed(WEIGHTS, more="pytorch_model.bin"),
        (INDEX, "'pytorch_model.bin'", "pickle"),
    ),
    "a shard above": (indexed("../other.safetensors"), ("../other.safetensors", "outside")),
    "a shard anywhere": (indexed("/tmp/other.safetensors"), (INDEX, "'/tmp/other.safetensors'")),
    "a shard with a line break": (indexed("a\n.safetensors"), (INDEX, "'a\\n.safetensors'")),
    "a shard that is a number": (indexed(7), (INDEX, "file names")),
    "an index without metadata": (
        lambda folder: (folder / INDEX).write_text(json.dumps({"weight_map": {"a": WEIGHTS}})),
        (INDEX, '"metadata"'),
    ),
    "a pickle by content": (written(WEIGHTS, pickle.dumps(Runs())), (WEIGHTS, "is damaged")),
    "a header longer than the file": (
        written(WEIGHTS, struct.pack("<Q", 2**40)),
        (WEIGHTS, "is damaged"),
    ),
    "a header without tensors": (header(lambda found: {}), (WEIGHTS, "is damaged")),
    "a type unheard of": (first_tensor(dtype="F99"), (WEIGHTS, "is damaged")),
    "a negative shape": (first_tensor(shape=[-1, 64]), (WEIGHTS, "is damaged")),
    "a shape beyond the data": (first_tensor(shape=[2**40, 2**40]), (WEIGHTS, "is damaged")),
    "data that overlaps": (first_tensor(data_offsets=[0, 64]), (WEIGHTS, "is damaged")),
    "integers": (
        weights(lambda found: {n: t.long() for n, t in found.items()}),
        ("I64", "floating"),
    ),
    "transposed weights": (
        weights(
            lambda found: {n: t.mT.contiguous() if t.ndim == 2 else t for n, t in found.items()}
        ),
        ("other sizes than config.json",),
    ),
    "a scalar": (
        weights(lambda found: {**found, FUSED: torch.zeros(())}),
        (FUSED, "(), expected (128, 64)"),
    ),
    "a lost tensor": (
        weights(lambda found: {name: one for name, one in found.items() if name != FUSED}),
        ("lacks 3 tensors", "layers.0.self_attn"),
    ),
    "a tensor by two names": (
        weights(lambda found: {**found, "lm_head.weight": torch.zeros(528, 64)}),
        ("is there twice",),
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_damaged_or_hostile_checkpoint_is_refused_before_it_takes_memory(
    folder, kind, monkeypatch
):
    damage, parts = REFUSED[kind]
    damage(folder)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", forbidden)  # what takes the memory
    message = refusal(folder)
    for part in parts:
        assert part in message


def test_the_weights_that_are_looked_at_are_those_that_are_loaded(folder):
    """transformers prefers one file to shards, whatever the index says."""
    shutil.copy(folder / WEIGHTS, folder / "good.safetensors")
    indexed("good.safetensors")(folder)
    weights(lambda found: {**found, FUSED: torch.zeros(1, 64)})(folder)
    assert "(1, 64), expected (128, 64)" in refusal(folder)


LOADED = {
    "code that nothing names": written("modeling_chatglm.py", b"raise RuntimeError('ran')"),
    "a pickle beside the weights": written("pytorch_model.bin", pickle.dumps(Runs())),
    "an index of the one file": indexed(WEIGHTS),
    "a template that never ends": edited(
        TOKENIZER, chat_template="{% for a in range(10**18) %}x{% endfor %}"
    ),
    "keys that transformers acts on": edited(
        "config.json", num_labels=10**9, transformers_weights="weights.bin", to_dict=1, vocab_size=9
    ),
    "layers of the text_config": edited("config.json", text_config={"num_hidden_layers": 10**9}),
    "paths in the tokenizer's file": edited(
        TOKENIZER, vocab_file="/etc/passwd", tokenizer_file="x"
    ),
    "the official code's names": edited(
        "config.json",
        auto_map={
            "AutoModel": "zai-org/glm-4v-9b--modeling_chatglm.ChatGLMForConditionalGeneration"
        },
    ),
}


@pytest.mark.parametrize("kind", LOADED)
def test_what_is_merely_beside_the_point_changes_nothing(folder, kind, chat):
    LOADED[kind](folder)
    model, processor = load(folder, dtype=torch.float32)
    for name, tensor in chat[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    question = [{"role": "user", "content": "a"}]
    ids = processor.apply_chat_template(question)["input_ids"]
    assert torch.equal(ids, chat[1].apply_chat_template(question)["input_ids"])
