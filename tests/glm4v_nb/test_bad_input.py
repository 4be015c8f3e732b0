"""Bad input: every error says what was wrong, what was expected and what to do."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

from glm4v_nb.model import GLM4VConfig, GLM4VForConditionalGeneration
from glm4v_nb.model.configuration import GLM4VVisionConfig

FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))


def says(raised, *parts):
    """What was wrong, expected and to do; files, sizes and names among them. In this order."""
    message, position = str(raised.value), 0
    for part in parts:
        assert part in message[position:], f"{part!r} is not in its place in: {message}"
        position = message.index(part, position) + len(part)


def refused(directory, error=ValueError, **options):
    """Loading fails in the same way through the Auto class and through the class itself."""
    with pytest.raises(error) as by_name:
        GLM4VForConditionalGeneration.from_pretrained(directory, **options)
    with pytest.raises(error) as raised:
        AutoModelForCausalLM.from_pretrained(directory, **options)
    assert str(by_name.value) == str(raised.value)
    return raised


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# The checkpoint


def test_a_text_only_chatglm_checkpoint_is_refused(damaged):
    edit_json(damaged / "config.json", lambda config: config.pop("vision_config"))
    expected = (
        'no "vision_config"',
        "text-only",
        "GLM-4V-9B was expected",
        "Load zai-org/glm-4v-9b",
    )
    says(refused(damaged), *expected)
    with pytest.raises(ValueError) as raised:
        AutoConfig.from_pretrained(damaged)
    says(raised, *expected)


def test_a_missing_shard_is_named(damaged):
    (damaged / SECOND).unlink()
    raised = refused(damaged, FileNotFoundError)
    says(
        raised,
        str(damaged),
        "1 of 2 shards",
        "index.json are missing",
        SECOND,
        "Download the missing files",
    )


@pytest.mark.parametrize(
    "kept", [0.0, 0.001, 0.5, 0.99999], ids=["empty", "in the header", "half", "almost all"]
)
def test_a_truncated_file_is_named(damaged, kept):
    content = (damaged / SECOND).read_bytes()
    (damaged / SECOND).write_bytes(content[: int(len(content) * kept)])
    size = f"{int(len(content) * kept):,} bytes"
    says(refused(damaged), SECOND, "is damaged", size, "Expected a complete", "download it again")


def test_a_corrupt_header_is_named(damaged):
    content = bytearray((damaged / FIRST).read_bytes())
    content[8:40] = b"\xff" * 32
    (damaged / FIRST).write_bytes(content)
    says(
        refused(damaged),
        FIRST,
        "is damaged",
        "Expected a complete safetensors file",
        "download it again",
    )


def test_a_git_lfs_pointer_in_place_of_a_shard_is_named(damaged):
    (damaged / FIRST).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1069584\n"
    )
    says(
        refused(damaged),
        FIRST,
        "is a Git LFS pointer",
        "not the weights themselves",
        "git lfs pull",
    )


def test_a_shard_of_another_checkpoint_is_named(damaged):
    shutil.copyfile(damaged / FIRST, damaged / SECOND)
    says(
        refused(damaged),
        SECOND,
        "lacks",
        "first 'transformer.vision.conv.bias'",
        "index",
        "download both",
    )


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_named(damaged, content):
    (damaged / "model.safetensors.index.json").write_text(content)
    says(
        refused(damaged),
        "model.safetensors.index.json is not",
        'JSON with a "weight_map"',
        "Download the file",
    )


@pytest.mark.parametrize(
    "name", ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin", "consolidated.pt"]
)
def test_pickled_weights_alone_are_refused_without_opening_them(damaged, name):
    for path in damaged.glob("model*"):
        path.unlink()
    # Not a pickle at all: reading it would be another error.
    (damaged / name).write_bytes(b"\x00" * 64)
    raised = refused(damaged, FileNotFoundError)
    says(
        raised,
        "only pickled weights",
        name,
        "expected model.safetensors",
        "Download the safetensors files",
    )


def test_a_directory_without_weights_is_refused(damaged):
    for path in damaged.glob("model*"):
        path.unlink()
    raised = refused(damaged, FileNotFoundError)
    says(
        raised,
        str(damaged),
        "no weights at all",
        "expected model.safetensors",
        "Download the safetensors files",
    )


def test_asking_for_pickled_weights_is_refused(checkpoint):
    says(
        refused(checkpoint, use_safetensors=False),
        "use_safetensors=False",
        "Only safetensors",
        "leave",
    )


def test_pickled_weights_beside_safetensors_are_not_opened(damaged):
    (damaged / "pytorch_model.bin").write_bytes(b"\x00" * 64)
    GLM4VForConditionalGeneration.from_pretrained(damaged)


def test_a_checkpoint_that_lacks_tensors_is_refused(damaged):
    lost = [
        "transformer.vision.eoi",
        "transformer.encoder.layers.1.self_attention.query_key_value.bias",
    ]
    tensors = load_file(damaged / FIRST)
    for name in lost:
        del tensors[name]
    save_file(tensors, damaged / FIRST, metadata={"format": "pt"})
    edit_json(
        damaged / "model.safetensors.index.json",
        lambda index: [index["weight_map"].pop(name) for name in lost],
    )
    # The three parts of the fused tensor and the vector.
    raised = refused(damaged)
    says(
        raised,
        str(damaged),
        "lacks 4 tensors",
        "language_model.layers.1.self_attn",
        "Download",
        "config.json",
    )


def test_a_config_with_more_layers_than_the_weights_is_refused(damaged):
    edit_json(damaged / "config.json", lambda config: config.update(num_layers=4))
    says(refused(damaged), "lacks 11 tensors", "language_model.layers.3", "check that config.json")


def test_a_config_of_another_image_size_than_the_weights_is_refused(damaged):
    edit_json(
        damaged / "config.json",
        lambda config: config["vision_config"].update(image_size=112, num_positions=65),
    )
    says(
        refused(damaged),
        "1 tensors have other sizes",
        "position_embedding",
        "(17, 48), expected (65, 48)",
        "same",
    )
    GLM4VForConditionalGeneration.from_pretrained(damaged, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            {"image_size": 60},
            ("image_size 60", "multiple of two patches of 14", "Use a multiple of 28"),
        ),
        ({"image_size": 84}, ("num_positions is 17", "make 37", "Correct one")),
        ({"num_positions": 18}, ("num_positions is 18", "make 17", "Correct one")),
        (
            {"num_heads": 5},
            ("hidden_size 48", "not divisible by num_heads 5", "same number of features"),
        ),
        ({"dropout_prob": 0.1}, ("dropout_prob is 0.1", "Only 0.0", "Set it to 0.0")),
    ],
    ids=str,
)
def test_a_vision_config_that_contradicts_itself_is_refused(damaged, change, parts):
    edit_json(damaged / "config.json", lambda config: config["vision_config"].update(change))
    says(refused(damaged), "config.json, vision_config", *parts)


@pytest.mark.parametrize(
    "change",
    [
        {"rmsnorm": False},
        {"multi_query_attention": False},
        {"add_bias_linear": True},
        {"original_rope": False},
    ],
    ids=str,
)
def test_a_chatglm_of_another_architecture_is_refused(damaged, change):
    edit_json(damaged / "config.json", lambda config: config.update(change))
    ((name, value),) = change.items()
    says(
        refused(damaged),
        "config.json",
        f"{name} is {value}",
        f"has {not value}",
        "Load a GLM-4V-9B checkpoint",
    )


def test_an_unknown_attention_is_refused_with_the_possible_ones(checkpoint):
    says(
        refused(checkpoint, attn_implementation="nonsense"),
        '"nonsense"',
        "not supported",
        "eager",
        "sdpa",
    )


def test_the_default_vision_config_is_that_of_the_official_model():
    assert GLM4VConfig().vision_config.to_dict() == GLM4VVisionConfig().to_dict()
    assert GLM4VVisionConfig().image_tokens == 1602


# The prompt

IMAGE = (311, 301, 312)


def ids(*rows):
    return torch.tensor([[303, 304, *row] for row in rows])


@pytest.fixture(params=["forward", "generate"])
def run(request, model):
    """Both ways to the model refuse bad prompts."""
    call = model if request.param == "forward" else model.generate
    options = {} if request.param == "forward" else {"max_new_tokens": 1, "do_sample": False}
    return lambda input_ids, **inputs: call(input_ids=input_ids, **inputs, **options)


def images(count):
    return torch.zeros(count, 3, 56, 56)


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_images_than_placeholders_is_refused(run, count):
    with pytest.raises(ValueError) as raised:
        run(ids((*IMAGE, 20), (*IMAGE, 21)), pixel_values=images(count))
    says(
        raised,
        f"{count} image(s)",
        "2 image placeholder(s)",
        "must be equal",
        "Build ids and pixel_values",
    )


def test_a_placeholder_without_an_image_is_refused(run):
    with pytest.raises(ValueError) as raised:
        run(ids((*IMAGE, 20)))
    says(
        raised,
        "1 prompt(s) hold an image placeholder",
        "no pixel_values",
        "Pass the images",
        "without one",
    )


def test_an_image_without_a_placeholder_is_refused(run):
    with pytest.raises(ValueError) as raised:
        run(ids((20, 21, 22)), pixel_values=images(1))
    says(raised, "1 image(s)", "0 image placeholder(s)", "must be equal", "apply_chat_template")


def test_two_images_in_one_prompt_are_refused(run):
    with pytest.raises(ValueError) as raised:
        run(ids((20,) * 7, (*IMAGE, 20, *IMAGE)), pixel_values=images(2))
    says(
        raised, "Prompt 1 holds 2 image placeholders", "one image per prompt", "Ask about one image"
    )


@pytest.mark.parametrize(
    "row",
    [
        (311, 312, 20, 21),
        (311, 301, 20, 312),
        (20, 21, 311, 301),
        (20, 21, 22, 311),
        (312, 301, 311, 20),
    ],
    ids=["no placeholder", "two ids between", "no end", "nothing follows", "wrong way round"],
)
def test_a_malformed_placeholder_is_refused(run, row):
    with pytest.raises(ValueError) as raised:
        run(ids(row), pixel_values=images(1))
    says(
        raised,
        "Prompt 0",
        "(311)",
        "(312)",
        "exactly one placeholder",
        "Build prompts with the processor's",
    )


def test_a_prompt_may_fill_the_context_but_not_exceed_it(run, model):
    limit = model.config.seq_length
    run(ids((20,) * (limit - 2)))
    with pytest.raises(ValueError) as raised:
        run(ids((20,) * (limit - 1)))
    says(raised, f"{limit + 1}", f"context is {limit} (seq_length)", "Shorten the text")


def test_a_prompt_with_an_image_may_fill_the_context_but_not_exceed_it(run, model):
    limit, features = model.config.seq_length, model.config.vision_config.image_tokens
    assert (limit, features) == (256, 6)
    run(ids((*IMAGE, *(20,) * (limit - 2 - features))), pixel_values=images(1))
    with pytest.raises(ValueError) as raised:
        run(ids((*IMAGE, *(20,) * (limit - 1 - features))), pixel_values=images(1))
    says(
        raised,
        "takes 257 positions",
        "(6 of them the image)",
        "context is 256 (seq_length)",
        "Shorten",
    )


def test_padding_does_not_count_as_context(model):
    prompt = ids((20,) * 256)
    mask = torch.ones_like(prompt)
    mask[:, :2] = 0
    model.generate(prompt, attention_mask=mask, max_new_tokens=1, do_sample=False)


@pytest.mark.parametrize(
    "shape", [(1, 3, 28, 28), (1, 1, 56, 56), (3, 56, 56), (1, 56, 56, 3), (1, 1, 3, 56, 56)]
)
def test_pixel_values_of_a_wrong_shape_are_refused(run, model, shape):
    expected = (
        f"shape {shape}",
        "expected (images, 3, 56, 56)",
        "image_size",
        "Make them with",
        "processor",
    )
    with pytest.raises(ValueError) as raised:
        run(ids((*IMAGE, 20)), pixel_values=torch.zeros(shape))
    says(raised, *expected)
    with pytest.raises(ValueError) as raised:
        model.get_image_features(torch.zeros(shape))
    says(raised, *expected)


def test_a_mask_of_another_length_than_the_ids_is_refused(model):
    with pytest.raises(ValueError) as raised:
        model.generate(ids((*IMAGE, 20)), pixel_values=images(1), attention_mask=torch.ones(1, 9))
    says(
        raised,
        "attention_mask has the shape (1, 9)",
        "(1, 6)",
        "must be equal",
        "pass the whole conversation",
    )


@pytest.mark.parametrize("tokenize", [True, False])
def test_an_unknown_role_is_refused(chat, tokenize):
    _, processor = chat
    with pytest.raises(ValueError) as raised:
        processor.apply_chat_template(
            [{"role": "developer", "content": "hello"}], tokenize=tokenize
        )
    says(raised, "Message 1", "developer", "Expected", "system", "user", "assistant", "observation")


def test_a_processor_of_another_image_size_than_the_config_is_refused(chat_checkpoint, tmp_path):
    directory = shutil.copytree(chat_checkpoint, tmp_path / "checkpoint")
    edit_json(
        directory / "config.json",
        lambda config: config["vision_config"].update(image_size=112, num_positions=65),
    )
    with pytest.raises(ValueError) as raised:
        AutoProcessor.from_pretrained(directory)
    says(raised, "image_size 56", "112", "Both must be", "same checkpoint")
