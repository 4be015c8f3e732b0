"""The processor: official files in, the model's inputs out."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

import glm4v_nb  # noqa: F401  registers the classes
from glm4v_nb.model.image_processing import GLM4VImageProcessor
from glm4v_nb.model.processing import GLM4VProcessor
from glm4v_nb.model.tokenization import ChatGLM4Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "tokenizer" / "expected.json").read_text(encoding="utf-8"))
RED, BLUE = Image.new("RGB", (30, 20), "red"), Image.new("RGB", (20, 30), "blue")


@pytest.fixture
def directory(tmp_path):
    """The files an official checkpoint has for its processor: no preprocessor_config.json."""
    shutil.copyfile(GOLDEN / "checkpoint" / "config.json", tmp_path / "config.json")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(GOLDEN / "tokenizer" / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def processor(directory):
    return AutoProcessor.from_pretrained(directory)


def edit(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def question(text, image=None):
    return [{"role": "user", "content": text, "image": image}]


def with_images(case):
    """A recorded conversation with a real image where it has only the placeholder."""
    return [
        message | {"image": RED if message.get("image") else None} for message in case["messages"]
    ]


def same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_autoprocessor_loads_the_official_files(processor):
    assert isinstance(processor, GLM4VProcessor)
    assert isinstance(processor.tokenizer, ChatGLM4Tokenizer)
    assert processor.image_processor.image_size == 56


@pytest.fixture
def library_log(caplog, monkeypatch):
    """What transformers logs; by default its records go to stderr and nowhere else."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog


def test_autoprocessor_never_asks_for_remote_code_and_says_nothing(
    directory, monkeypatch, library_log
):
    monkeypatch.setattr(
        "builtins.input", lambda *_: pytest.fail("asked whether to run remote code")
    )
    AutoProcessor.from_pretrained(directory)
    assert library_log.text == ""


@pytest.mark.parametrize("number", range(4))
def test_conversation_ids_equal_the_originals(processor, number):
    case = EXPECTED["conversations"][number]
    inputs = processor.apply_chat_template(
        with_images(case),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )
    assert inputs["input_ids"].tolist() == [case["ids"]]
    assert inputs["attention_mask"].tolist() == [[1] * len(case["ids"])]
    assert ("pixel_values" in inputs) == any(message.get("image") for message in case["messages"])


def test_pixel_values_are_those_of_the_conversations_image(processor):
    inputs = processor.apply_chat_template(question("What is it?", RED))
    assert torch.equal(inputs["pixel_values"], processor.image_processor(RED).pixel_values)
    assert inputs["pixel_values"].shape == (1, 3, 56, 56)


def test_a_batch_has_its_images_in_the_order_of_its_rows(processor):
    batch = processor.apply_chat_template(
        [question("one", BLUE), question("only text, and longer"), question("three", RED)],
        add_generation_prompt=True,
    )
    assert torch.equal(batch["pixel_values"], processor.image_processor([BLUE, RED]).pixel_values)
    assert batch["input_ids"].eq(522).sum(dim=1).tolist() == [1, 0, 1]
    for row, messages in enumerate([question("one", BLUE), question("only text, and longer")]):
        alone = processor.apply_chat_template(messages, add_generation_prompt=True)["input_ids"][0]
        assert torch.equal(batch["input_ids"][row, -len(alone) :], alone)
        assert batch["attention_mask"][row].sum() == len(alone)


def test_an_image_part_with_a_path_equals_the_image_itself(processor, tmp_path):
    RED.save(tmp_path / "red.png")
    expected = processor.apply_chat_template(question("What is it?", RED))
    for part in (
        {"path": str(tmp_path / "red.png")},
        {"url": str(tmp_path / "red.png")},
        {"image": RED},
    ):
        parts = [{"type": "image", **part}, {"type": "text", "text": "What is it?"}]
        same(processor.apply_chat_template([{"role": "user", "content": parts}]), expected)


def test_the_options_of_transformers_pipelines_are_taken(processor):
    expected = processor.apply_chat_template([question("a"), question("a b c")])
    options = {"padding": "max_length", "max_length": 20, "return_tensors": "pt"}
    longer = processor.apply_chat_template(
        [question("a"), question("a b c")], processor_kwargs=options
    )
    assert longer["input_ids"].shape == (2, 20)
    assert torch.equal(
        longer["input_ids"][:, -expected["input_ids"].shape[1] :], expected["input_ids"]
    )
    same(
        processor.apply_chat_template([question("a"), question("a b c")], return_tensors="auto"),
        expected,
    )


def test_other_return_types_are_given_on_request(processor):
    messages = question("a", RED)
    inputs = processor.apply_chat_template(messages, return_tensors=None)
    assert isinstance(inputs["input_ids"], list) and isinstance(inputs["pixel_values"], list)
    assert processor.apply_chat_template(messages, return_dict=False).tolist() == [
        inputs["input_ids"]
    ]
    assert processor.apply_chat_template(messages, tokenize=False).startswith(
        "[gMASK]<sop><|user|>"
    )


def test_a_call_with_text_and_image_is_a_conversation_of_one_question(processor):
    expected = processor.apply_chat_template(
        question("What is it?", RED), add_generation_prompt=True
    )
    same(processor(images=RED, text="What is it?"), expected)
    same(processor(RED, "What is it?", return_tensors="pt"), expected)
    expected = processor.apply_chat_template(
        [question("a"), question("b", RED)], add_generation_prompt=True
    )
    same(processor(text=["a", "b"], images=[None, RED]), expected)
    same(processor(text=["a", "b"], images=[[], [RED]]), expected)
    same(
        processor(text="a"),
        processor.apply_chat_template(question("a"), add_generation_prompt=True),
    )
    assert list(processor(images=RED)) == ["pixel_values"]


def test_decoding_passes_through(processor):
    ids = processor.apply_chat_template(question("hello"))["input_ids"]
    assert processor.decode(ids[0]) == "[gMASK]<sop><|user|>\nhello"
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["\nhello"]
    assert set(processor.model_input_names) == {"input_ids", "attention_mask", "pixel_values"}


@pytest.mark.parametrize("with_config", [True, False])
def test_a_saved_processor_gives_the_same_inputs(processor, directory, tmp_path, with_config):
    saved = tmp_path / "saved"
    processor.save_pretrained(saved)
    assert (saved / "tokenizer.model").read_bytes() == (directory / "tokenizer.model").read_bytes()
    if with_config:
        shutil.copyfile(directory / "config.json", saved / "config.json")
    again = AutoProcessor.from_pretrained(saved)
    assert isinstance(again, GLM4VProcessor)
    batch = [with_images(case) for case in EXPECTED["conversations"]]
    same(again.apply_chat_template(batch), processor.apply_chat_template(batch))


def test_without_config_json_the_size_is_the_tokenizers(directory):
    (directory / "config.json").unlink()
    assert GLM4VProcessor.from_pretrained(directory).image_processor.image_size == 56


def test_without_a_size_in_the_tokenizers_config_the_size_is_the_models(directory):
    edit(directory / "tokenizer_config.json", lambda config: config.pop("image_size"))
    assert AutoProcessor.from_pretrained(directory).image_processor.image_size == 56


def test_files_that_disagree_about_the_image_size_are_refused(processor, directory, tmp_path):
    edit(directory / "tokenizer_config.json", lambda config: config.update(image_size=1120))
    with pytest.raises(ValueError, match="tokenizer_config.json has image_size 1120, .* has 56"):
        AutoProcessor.from_pretrained(directory)
    saved = tmp_path / "saved"
    GLM4VProcessor(GLM4VImageProcessor(56), processor.tokenizer).save_pretrained(saved)
    shutil.copyfile(directory / "config.json", saved / "config.json")
    larger = {"image_size": 112, "num_positions": 65}
    edit(saved / "config.json", lambda config: config["vision_config"].update(larger))
    with pytest.raises(ValueError, match="image_size 112, but the saved processor has 56"):
        AutoProcessor.from_pretrained(saved)


def test_a_text_only_checkpoint_is_refused(directory):
    edit(directory / "config.json", lambda config: config.pop("vision_config"))
    with pytest.raises(ValueError, match="no vision_config.image_size: this is not a GLM-4V"):
        GLM4VProcessor.from_pretrained(directory)


def test_a_placeholder_without_an_image_is_refused(processor):
    with pytest.raises(ValueError, match="image placeholder but no image"):
        processor.apply_chat_template(question("a", True))
    with pytest.raises(ValueError, match="image placeholder but no image"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"text": ["a", "b"], "images": RED}, ValueError, "1 images for 2 texts"),
        ({"text": "a", "images": [RED, BLUE]}, ValueError, "2 images for 1 texts"),
        ({"text": 3}, TypeError, "neither str nor a list of str"),
        ({"text": [{"role": "user"}]}, TypeError, "call apply_chat_template"),
        ({"text": "[gMASK]<sop><|user|>\na<|assistant|>"}, ValueError, "rendered prompt"),
        ({"text": ""}, ValueError, "conversation is empty"),
        ({"text": "a", "images": "https://example.org/a.png"}, ValueError, "is a URL"),
    ],
)
def test_wrong_arguments_of_a_call_are_refused(processor, arguments, error, message):
    with pytest.raises(error, match=message):
        processor(**arguments)


def test_wrong_conversations_are_refused(processor):
    with pytest.raises(ValueError, match="conversation is empty"):
        processor.apply_chat_template([])
    with pytest.raises(ValueError, match="has 2 images"):
        processor.apply_chat_template(question("a", RED) + question("b", RED))
    with pytest.raises(ValueError, match="role 'tool'"):
        processor.apply_chat_template([{"role": "tool", "content": "a"}])
    with pytest.raises(ValueError, match="tools is set"):
        processor.apply_chat_template(question("a"), tools=[{}])
