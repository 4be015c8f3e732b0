"""A stranger's checkpoint: only plain files of its directory are read, and none of its code."""

import ast
import os
import shutil
from pathlib import Path

import pytest
from damage import INDEX, WEIGHTS, edited, indexed, refusal, replaced
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from glm4v_nb.inference import load
from glm4v_nb.model import GLM4VForConditionalGeneration
from glm4v_nb.model.configuration import read_config

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


def test_an_adapter_without_weights_of_its_own_redirects_no_auto_class(folder, chat_checkpoint):
    for path in folder.iterdir():
        path.unlink()
    edited("adapter_config.json", base_model_name_or_path=str(chat_checkpoint))(folder)
    with pytest.raises(ValueError, match="holds a LoRA adapter"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


TOKENIZER = "tokenizer_config.json"
CODE = {"AutoConfig": "m.C", "AutoModelForCausalLM": "m.C", "AutoTokenizer": ["m.C", None]}
CODE |= {"AutoProcessor": "m.C"}


@pytest.mark.parametrize(
    ("reader", "file"),
    [
        (AutoConfig, "config.json"),
        (AutoModelForCausalLM, "config.json"),
        (AutoTokenizer, TOKENIZER),
        (AutoProcessor, TOKENIZER),
        (AutoProcessor, "processor_config.json"),
    ],
)
def test_no_auto_class_asks_whether_code_of_this_model_s_checkpoint_may_run(folder, reader, file):
    classes = (
        {"tokenizer_class": "Mine", "processor_class": "Mine"} if file != "config.json" else {}
    )
    edited(file, auto_map=CODE, **classes)(folder)
    with pytest.raises(ValueError, match=rf"{file}: auto_map names 'm\.C'.*never run"):
        reader.from_pretrained(folder)


@pytest.mark.parametrize(
    ("reader", "file", "damage"),
    [
        (AutoTokenizer, TOKENIZER, {"added_tokens_decoder": [1]}),
        (AutoTokenizer, TOKENIZER, {"tokenizer_class": [1]}),
        (AutoProcessor, "processor_config.json", {"processor_class": 5}),
        (AutoModelForCausalLM, "generation_config.json", {"watermarking_config": 5}),
    ],
)
def test_an_auto_class_names_the_damaged_file_in_one_sentence(folder, reader, file, damage):
    edited(file, **damage)(folder)
    with pytest.raises(ValueError, match=rf"{file}.*ownload.*again\.$"):
        reader.from_pretrained(folder)


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
