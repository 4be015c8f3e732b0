"""A stranger's checkpoint is refused in one sentence that names the file, or it loads; nothing of
it runs, nothing of it is a pickle, and no size in it takes memory before the weights confirm it."""

import ast
import json
import os
import pickle
import resource
import shutil
import struct
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import hub_kernels

from glm4v_nb.inference import load
from glm4v_nb.model import GLM4VForConditionalGeneration
from glm4v_nb.model.configuration import read_config

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FUSED = "transformer.encoder.layers.0.self_attention.query_key_value.weight"


def forbidden(*args, **kwargs):
    pytest.fail("asked a question, read a pickle or fetched code")


@pytest.fixture
def folder(chat_checkpoint, tmp_path, monkeypatch):
    """A copy of a good checkpoint to damage, where nobody may be asked, no pickle read, and no
    gigabyte taken."""
    monkeypatch.setattr("builtins.input", forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    monkeypatch.setattr(hub_kernels, "get_kernel", forbidden)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = psutil.Process().memory_info().vms + 512 * 2**20  # of the machine, whatever a file says
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    yield shutil.copytree(chat_checkpoint, tmp_path / "checkpoint")
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def refusal(directory, error=(ValueError, FileNotFoundError)) -> str:
    with pytest.raises(error) as raised:
        load(directory)
    message = str(raised.value)
    assert "\n" not in message and len(message) < 700, message
    return message


def edited(file, part=None, **values):
    """Change keys of a JSON file, of an object inside it if ``part`` is given; make the file."""

    def damage(folder):
        path = folder / file
        content = json.loads(path.read_text()) if path.exists() else {}
        (content[part] if part else content).update(values)
        path.write_text(json.dumps(content))

    return damage


def written(file, content):
    return lambda folder: (folder / file).write_bytes(content)


def replaced(file, make):
    """Something else in place of the file, made by ``make(path)``."""

    def damage(folder):
        (folder / file).unlink(missing_ok=True)
        make(folder / file)

    return damage


def vision(**values):
    return edited("config.json", "vision_config", **values)


def indexed(shard, **more):
    """An index that places every tensor in ``shard``."""

    def damage(folder):
        places = dict.fromkeys(load_file(folder / WEIGHTS), shard)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places | more}))

    return damage


def weights(change):
    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        save_file(change(tensors) or tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def header(change):
    """Rewrite the JSON header of the weights, its length and the data left as they are."""

    def damage(folder):
        content = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        text = change(json.loads(content[8 : 8 + length]))
        text = json.dumps(text).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return damage


def first_tensor(**values):
    return header(lambda found: {**found, FUSED: found[FUSED] | values})


class Runs:
    """Code, to a reader of pickles."""

    def __reduce__(self):
        return forbidden, ()


JSON_FILES = ("config.json", "tokenizer_config.json", "generation_config.json")
JSON_FILES += ("preprocessor_config.json", "processor_config.json", INDEX)
NOT_AN_OBJECT = {
    "empty": b"",
    "cut": b'{"a": ',
    "a list": b"[1]",
    "null": b"null",
    "another encoding": "{}".encode("utf-16"),
    "thousands of brackets": b"[" * 50_000,
    "a number of 5,000 digits": b'{"a": ' + b"9" * 5_000 + b"}",
}


@pytest.mark.parametrize("content", NOT_AN_OBJECT.values(), ids=NOT_AN_OBJECT)
@pytest.mark.parametrize("file", JSON_FILES)
def test_a_file_that_holds_no_json_object_is_named(folder, file, content):
    (folder / file).write_bytes(content)
    message = refusal(folder)
    assert str(folder / file) in message and "Download the file again" in message


@pytest.mark.parametrize("file", [*JSON_FILES, "tokenizer.model", WEIGHTS])
@pytest.mark.parametrize(
    "make",
    [os.mkdir, os.mkfifo, lambda path: path.symlink_to(path), lambda path: path.symlink_to("none")],
    ids=["a directory", "a pipe", "a link to itself", "a link to nothing"],
)
def test_what_is_no_plain_file_is_named(folder, file, make):
    replaced(file, make)(folder)
    message = refusal(folder)
    assert str(folder / file) in message and "no plain file" in message


@pytest.mark.parametrize("file", [*JSON_FILES, "tokenizer.model", WEIGHTS])
def test_a_link_out_of_the_directory_is_not_followed(folder, tmp_path, file):
    outside = tmp_path / f"outside-{file}"
    if (folder / file).exists():
        shutil.copy(folder / file, outside)
    else:
        outside.write_text("{}")
    replaced(file, lambda path: path.symlink_to(outside))(folder)
    message = refusal(folder)
    assert str(folder / file) in message and f"leads to {outside}" in message


@pytest.mark.parametrize("part", ["", "part"])
def test_the_links_of_the_hub_s_cache_are_followed(folder, tmp_path, part):
    repository = tmp_path / "models--a--b"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / ("0" * 40) / part
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(folder.iterdir()):
        shutil.copy(path, blobs / str(number))
        link = os.path.relpath(blobs / str(number), snapshot)
        (snapshot / path.name).symlink_to(link)
    load(snapshot)


def test_a_repository_is_downloaded_without_code_and_looked_at_like_a_directory(
    folder, monkeypatch
):
    asked = []

    def download(name, **options):
        asked.append((name, options))
        return str(folder)

    monkeypatch.setattr("glm4v_nb.model.checkpoint_files.snapshot_download", download)
    model, _ = load("someone/fine-tune", revision="0" * 40)
    assert model.config.name_or_path == "someone/fine-tune"
    for name, options in asked:
        assert (name, options["revision"]) == ("someone/fine-tune", "0" * 40)
        assert not any("py" in pattern or pattern == "*" for pattern in options["allow_patterns"])
    indexed("weights.bin")(folder)
    with pytest.raises(ValueError, match=r"'weights\.bin'"):
        load("someone/fine-tune", revision="0" * 40)


def test_a_repository_that_cannot_be_had_is_named(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("offline,\nand not downloaded before")

    monkeypatch.setattr("glm4v_nb.model.checkpoint_files.snapshot_download", unreachable)
    with pytest.raises(
        FileNotFoundError, match="someone/fine-tune.*offline, and not.*directory of"
    ):
        load("someone/fine-tune", revision="0" * 40)


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


def test_an_adapter_without_weights_of_its_own_redirects_no_auto_class(folder, chat_checkpoint):
    for path in folder.iterdir():
        path.unlink()
    edited("adapter_config.json", base_model_name_or_path=str(chat_checkpoint))(folder)
    with pytest.raises(ValueError, match="holds a LoRA adapter"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


@pytest.mark.parametrize("name", ["variant", "gguf_file", "transformers_weights"])
def test_files_that_are_not_looked_at_cannot_be_asked_for(folder, name):
    with pytest.raises(ValueError, match=f"{name} is 'other'.*Leave the argument out"):
        GLM4VForConditionalGeneration.from_pretrained(folder, **{name: "other"})


@pytest.mark.parametrize("file", ["config.json", WEIGHTS])
def test_a_file_that_may_not_be_read_is_named(folder, file, monkeypatch):
    original = type(folder).open

    def denied(path, *args, **kwargs):
        if path.name == file:
            raise PermissionError(13, "Permission denied")
        return original(path, *args, **kwargs)

    monkeypatch.setattr(type(folder), "open", denied)
    message = refusal(folder)
    assert str(folder / file) in message and "Permission denied" in message


def test_a_configuration_alone_is_held_to_the_same_rules(folder):
    edited("config.json", num_layers=10**9)(folder)
    with pytest.raises(ValueError, match=r"config\.json: num_layers is 1000000000"):
        read_config(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"expected .*a directory with a GLM-4V-9B config\.json"):
        read_config(folder)


def test_every_auto_class_that_is_used_here_is_told_to_run_no_code():
    root = Path(__file__).parents[2]
    rooms = ("glm4v_nb", "simgpu", "benchmarks", "tools")
    found = []
    for path in (path for room in rooms for path in (root / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(ast.Attribute(ast.Name(name), "from_pretrained"), _, options):
                    if name.startswith("Auto") or name == "reader":
                        found.append("trust_remote_code" in [option.arg for option in options])
                        assert found[-1], f"{path}, line {node.lineno}"
    assert len(found) > 5
