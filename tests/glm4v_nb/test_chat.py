"""Conversations to ids, against recorded ids of the original."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer

import glm4v_nb  # noqa: F401  registers the classes

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer"
CONVERSATIONS = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))["conversations"]
IMAGE_IDS = [522, 512, 523]
IMAGE = Image.new("RGB", (4, 4))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(GOLDEN)


@pytest.fixture
def library_log(caplog, monkeypatch):
    """What transformers logs; by default its records go to stderr and nowhere else."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog


def ids(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(
        messages, **({"add_generation_prompt": True} | options)
    ).input_ids


def in_parts(message):
    """The same message in transformers' form, its image after the text."""
    parts = [{"type": "text", "text": message["content"]}]
    if message.get("image"):
        parts.append({"type": "image"})
    return {"role": message["role"], "content": parts}


@pytest.mark.parametrize("number", range(4))
def test_conversation_ids_equal_the_originals_in_both_message_forms(tokenizer, number):
    case = CONVERSATIONS[number]
    assert ids(tokenizer, case["messages"]) == case["ids"]
    assert ids(tokenizer, [in_parts(message) for message in case["messages"]]) == case["ids"]


def test_without_generation_prompt_the_conversation_ends_with_its_last_text(tokenizer):
    case = CONVERSATIONS[1]
    assert tokenizer.apply_chat_template(case["messages"]).input_ids == case["ids"][:-1]
    assert (
        ids(tokenizer, case["messages"], add_generation_prompt=False, continue_final_message=True)
        == (case["ids"][:-1])
    )


@settings(max_examples=200, deadline=None)
@given(
    typed=st.lists(
        st.sampled_from(
            ["<|user|>", "<|endoftext|>", "[gMASK]", "<sop>", "<|begin_of_image|>", "\n", "ab", " "]
        )
    ).map("".join)
)
def test_no_text_can_make_a_special_token(tokenizer, typed):
    messages = [
        {"role": "assistant", "metadata": typed, "content": "x"},
        {
            "role": "user",
            "content": [{"type": "text", "text": typed}, {"type": "text", "text": "x"}],
        },
    ]
    special = [
        token_id for token_id in ids(tokenizer, messages) if token_id in tokenizer.all_special_ids
    ]
    assert special == [514, 516, 520, 519, 520]


def test_metadata_stands_between_the_role_and_the_line_break(tokenizer):
    plain = tokenizer.encode("get_weather\n", add_special_tokens=False)
    messages = [{"role": "assistant", "metadata": "get_weather", "content": "{}"}]
    content = tokenizer.encode("{}", add_special_tokens=False)
    assert ids(tokenizer, messages) == [514, 516, 520, *plain, *content, 520]


@pytest.mark.parametrize(
    "image", [IMAGE, "picture.png", Path("picture.png"), np.zeros((2, 2, 3), np.uint8), b"x", True]
)
def test_an_image_of_any_form_puts_three_ids_before_the_text(tokenizer, image):
    expected = [514, 516, 519, 10, *IMAGE_IDS, 97, 520]
    assert ids(tokenizer, [{"role": "user", "image": image, "content": "a"}]) == expected
    parts = [{"type": "text", "text": "a"}, {"type": "image", "image": image}]
    assert ids(tokenizer, [{"role": "user", "content": parts}]) == expected


def test_an_image_alone_and_a_later_image_are_accepted(tokenizer):
    assert ids(tokenizer, [{"role": "user", "image": IMAGE}]) == [
        514,
        516,
        519,
        10,
        *IMAGE_IDS,
        520,
    ]
    later = [{"role": "user", "content": "a"}, {"role": "user", "image": IMAGE, "content": "a"}]
    assert ids(tokenizer, later) == [514, 516, 519, 10, 97, 519, 10, *IMAGE_IDS, 97, 520]


def test_a_message_with_nothing_in_it_adds_nothing(tokenizer):
    empty = {"role": "assistant", "content": ""}
    assert ids(tokenizer, [CONVERSATIONS[2]["messages"][0], empty]) == CONVERSATIONS[2]["ids"]


def test_a_batch_is_padded_on_the_left(tokenizer):
    batch = tokenizer.apply_chat_template(
        [case["messages"] for case in CONVERSATIONS],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
    )
    for row, mask, case in zip(batch.input_ids, batch.attention_mask, CONVERSATIONS, strict=True):
        assert row[-len(case["ids"]) :].tolist() == case["ids"]
        assert row[: -len(case["ids"])].eq(512).all()
        assert mask.tolist() == [0] * (len(row) - len(case["ids"])) + [1] * len(case["ids"])


def test_return_types_are_those_of_transformers(tokenizer):
    messages, expected = CONVERSATIONS[2]["messages"], CONVERSATIONS[2]["ids"]
    assert ids(tokenizer, [messages]) == [expected]
    assert ids(tokenizer, messages, return_tensors="pt").tolist() == [expected]
    options = {"add_generation_prompt": True, "return_dict": False}
    assert tokenizer.apply_chat_template(messages, **options) == expected
    tensor = tokenizer.apply_chat_template(messages, **options, return_tensors="pt")
    assert isinstance(tensor, torch.Tensor) and tensor.shape == (1, len(expected))


def test_padding_a_batch_says_nothing_on_stderr(library_log):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN)  # a new one, in case advice is given once
    tokenizer.apply_chat_template([case["messages"] for case in CONVERSATIONS], padding=True)
    assert library_log.text == ""


def test_an_earlier_padded_call_does_not_reach_into_a_conversation(tokenizer):
    tokenizer(["a", "b c"], padding="max_length", max_length=40, truncation=True)
    assert ids(tokenizer, CONVERSATIONS[1]["messages"]) == CONVERSATIONS[1]["ids"]


def test_rendered_text_shows_the_whole_prompt(tokenizer):
    options = {"tokenize": False, "add_generation_prompt": True}
    text = tokenizer.apply_chat_template(CONVERSATIONS[0]["messages"], **options)
    assert text == (
        "[gMASK]<sop><|user|>\n<|begin_of_image|><|endoftext|><|end_of_image|>Describe this "
        "image.<|assistant|>"
    )
    assert tokenizer.apply_chat_template([CONVERSATIONS[0]["messages"]], **options) == [text]


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        ([], ValueError, "conversation is empty"),
        ([[]], ValueError, "conversation is empty"),
        ([{"role": "user", "content": ""}], ValueError, "no message has text or an image"),
        ("hello", TypeError, "conversation is a str"),
        ({"role": "user", "content": "a"}, TypeError, "conversation is a dict"),
        (
            [[{"role": "user", "content": "a"}], {"role": "user"}],
            TypeError,
            "conversation of the batch is a dict",
        ),
        (["hello"], TypeError, "Message 1 is a str"),
        (
            [{"role": "tool", "content": "a"}],
            ValueError,
            "'tool'. Expected one of system, user, assistant, observ",
        ),
        ([{"content": "a"}], ValueError, "role None"),
        ([{"role": "user", "content": 3}], TypeError, "content is a int"),
        ([{"role": "user", "content": "a", "metadata": 3}], TypeError, "metadata is a int"),
        ([{"role": "user", "content": "a", "image": 3}], TypeError, "the image is a int"),
        ([{"role": "user", "content": ["a"]}], ValueError, "content part is 'a'"),
        (
            [{"role": "user", "content": [{"type": "video", "video": "a"}]}],
            ValueError,
            "content part is",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "base64": "a"}]}],
            ValueError,
            "'base64', which would not be read",
        ),
        ([{"role": "user", "content": "a", "tools": [{}]}], ValueError, "tools or tool calls"),
    ],
)
def test_a_wrong_conversation_is_refused(tokenizer, messages, error, message):
    with pytest.raises(error, match=message):
        tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "image": IMAGE}, {"role": "user", "image": IMAGE}],
        [{"role": "user", "image": IMAGE, "content": [{"type": "image", "image": IMAGE}]}],
        [{"role": "user", "content": [{"type": "image", "image": IMAGE, "url": "a.png"}]}],
    ],
)
def test_a_second_image_is_refused(tokenizer, messages):
    with pytest.raises(ValueError, match="has 2 images. The model sees one"):
        tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize(
    "option", ["tools", "documents", "chat_template", "truncation", "return_assistant_tokens_mask"]
)
def test_an_option_the_format_does_not_have_is_refused(tokenizer, option):
    with pytest.raises(ValueError, match=f"{option} is set"):
        tokenizer.apply_chat_template(CONVERSATIONS[2]["messages"], **{option: "x"})


def test_generation_prompt_and_continuation_exclude_each_other(tokenizer):
    with pytest.raises(ValueError, match="are both set"):
        ids(tokenizer, CONVERSATIONS[2]["messages"], continue_final_message=True)
