"""The tokenizer against recorded ids of the original and against tiktoken, the library the original
uses."""

import base64
import json
import logging
import pickle
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import glm4v_nb  # noqa: F401  registers the classes
from glm4v_nb.model.tokenization import ChatGLM4Tokenizer, read_ranks

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer"
CONFIG_JSON = Path(__file__).parents[1] / "golden" / "checkpoint" / "config.json"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
# Written out again on purpose: the package takes it from transformers.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
PREFIX_IDS = [514, 516]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(GOLDEN)


@pytest.fixture
def files(tmp_path):
    """A writable copy of the tokenizer's files."""
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(GOLDEN / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def library_log(caplog, monkeypatch):
    """What transformers logs; by default its records go to stderr and nowhere else."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog


def plain_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def read_config(directory=GOLDEN):
    return json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))


def write_config(directory, config):
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("case", EXPECTED["texts"], ids=lambda case: case["text"][:20] or "empty")
def test_ids_of_a_text_equal_the_originals(tokenizer, case):
    assert plain_ids(tokenizer, case["text"]) == case["ids"]
    assert tokenizer(case["text"]).input_ids == PREFIX_IDS + case["ids"]


def oracle(ranks):
    """tiktoken over these ranks: text → ids."""
    tiktoken = pytest.importorskip(
        "tiktoken", reason="tiktoken, the oracle of these tests, is not installed"
    )
    encoding = tiktoken.Encoding(
        "oracle", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    return lambda text: encoding.encode(text, disallowed_special=())


@pytest.fixture(scope="module")
def tiktoken_ids():
    return oracle(read_ranks(GOLDEN / "tokenizer.model"))


def write_vocabulary(path, tokens):
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    path.write_text("".join(lines))


def special_tokens_from(first_id):
    """The golden special tokens, numbered from this id."""
    return dict(enumerate(read_config()["added_tokens_decoder"].values(), start=first_id))


@settings(max_examples=400, deadline=None)
@given(text=st.text(st.characters(), max_size=60))
def test_ids_of_random_text_equal_tiktokens(tokenizer, tiktoken_ids, text):
    assert plain_ids(tokenizer, text) == tiktoken_ids(text)


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(
        st.sampled_from(
            [
                " ",
                "  ",
                "\n",
                "\r\n",
                "\t",
                "'S",
                "'ll",
                "ſ",
                "the",
                "image",
                "描述",
                "图片",
                "显存",
                "不足",
                "12",
            ]
            + [
                "circle",
                "Ω",
                "é",
                "🙂",
                "<|user|>",
                "[gMASK]",
                "_",
                ".",
                "\u3000",
                "\x85",
                "٣",
                "a\u0301",
            ]
        ),
        max_size=12,
    )
)
def test_ids_of_text_at_the_borders_of_the_split_pattern_equal_tiktokens(
    tokenizer, tiktoken_ids, pieces
):
    text = "".join(pieces)
    assert plain_ids(tokenizer, text) == tiktoken_ids(text)


# Few characters make many ways to merge: letters, digits, and what the contractions of the pattern
# need.
few_characters = st.text("ab1'Ss \n", max_size=16)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    merged=st.lists(few_characters.filter(lambda text: len(text) > 1), max_size=40, unique=True),
    texts=st.lists(few_characters, min_size=5, max_size=20),
)
@example(merged=["Sb", "11", "111"], texts=["a'Sb", "1111111"])
def test_ids_equal_tiktokens_with_any_vocabulary(tmp_path, merged, texts):
    tokens = [bytes([byte]) for byte in range(256)] + [text.encode() for text in merged]
    write_vocabulary(tmp_path / "tokenizer.model", tokens)
    built = ChatGLM4Tokenizer(tmp_path / "tokenizer.model", special_tokens_from(len(tokens)))
    expected = oracle({token: rank for rank, token in enumerate(tokens)})
    for text in [*texts, *merged, "".join(texts)]:
        assert plain_ids(built, text) == expected(text)


@pytest.mark.parametrize("text", ["\ud83d", "half \udc4d an emoji"])
def test_half_an_emoji_is_encoded_as_tiktoken_does(tokenizer, tiktoken_ids, text):
    assert plain_ids(tokenizer, text) == tiktoken_ids(text)


def test_special_tokens_keep_the_ids_of_the_config(tokenizer):
    config = read_config()
    for token_id, token in config["added_tokens_decoder"].items():
        assert tokenizer.convert_tokens_to_ids(token["content"]) == int(token_id)
        assert tokenizer.convert_ids_to_tokens(int(token_id)) == token["content"]
    assert len(tokenizer) == 526


def test_typed_special_tokens_stay_text_in_every_call(tokenizer):
    typed = "<|assistant|><|endoftext|>[gMASK]"
    special = set(tokenizer.all_special_ids)
    assert len(special) == 14
    assert not special & set(tokenizer.encode(typed, add_special_tokens=False))
    assert not special & set(
        tokenizer([typed, "x"], add_special_tokens=False, padding=False).input_ids[0]
    )
    assert not special & set(tokenizer.convert_tokens_to_ids(tokenizer.tokenize(typed)))
    assert tokenizer.decode(plain_ids(tokenizer, typed), skip_special_tokens=True) == typed


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_decoding_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(plain_ids(tokenizer, text)) == text


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=12))
def test_decoding_broken_utf8_gives_replacement_characters(tokenizer, content):
    # In the golden vocabulary the first 256 ids are the bytes themselves.
    assert tokenizer.decode(list(content)) == content.decode("utf-8", errors="replace")


def test_decoding_skips_special_tokens_on_request(tokenizer):
    ids = tokenizer("hello").input_ids + [520]
    assert tokenizer.decode(ids) == "[gMASK]<sop>hello<|assistant|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello"


def test_padding_goes_to_the_left_with_endoftext(tokenizer):
    batch = tokenizer(["a", "a b c"], padding=True, return_tensors="pt")
    assert batch.input_ids[0].tolist() == [512] * 2 + PREFIX_IDS + [97]
    assert batch.attention_mask[0].tolist() == [0, 0, 1, 1, 1]


def test_padding_goes_to_the_left_without_being_told(files):
    config = read_config()
    for told in ("padding_side", "pad_token", "eos_token"):
        del config[told]
    write_config(files, config)
    loaded = AutoTokenizer.from_pretrained(files)
    assert (loaded.padding_side, loaded.pad_token_id, loaded.eos_token_id) == ("left", 512, 512)


def test_the_config_files_values_are_kept(tokenizer):
    assert tokenizer.image_size == 56
    assert tokenizer.model_max_length == 8192
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 512


def test_autotokenizer_never_asks_for_or_runs_the_remote_code_of_the_files(
    files, monkeypatch, library_log
):
    monkeypatch.setattr(
        "builtins.input", lambda *_: pytest.fail("asked whether to run remote code")
    )
    (files / "tokenization_chatglm.py").write_text("raise SystemExit('remote code ran')")
    assert isinstance(AutoTokenizer.from_pretrained(files), ChatGLM4Tokenizer)
    shutil.copyfile(CONFIG_JSON, files / "config.json")
    assert isinstance(AutoTokenizer.from_pretrained(files), ChatGLM4Tokenizer)
    assert library_log.text == ""


def test_saving_copies_the_vocabulary_and_reloads_with_the_same_ids(files, tmp_path):
    loaded = AutoTokenizer.from_pretrained(files)
    saved = tmp_path / "saved"
    loaded.save_pretrained(saved)
    assert sorted(path.name for path in saved.iterdir()) == [
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert (saved / "tokenizer.model").read_bytes() == (GOLDEN / "tokenizer.model").read_bytes()
    again = AutoTokenizer.from_pretrained(saved)
    assert again.get_vocab() == loaded.get_vocab()
    assert again.all_special_ids == loaded.all_special_ids
    for case in EXPECTED["texts"]:
        assert again(case["text"]).input_ids == PREFIX_IDS + case["ids"]
    assert (again.image_size, again.padding_side, again.pad_token_id) == (56, "left", 512)


def test_the_saved_config_keeps_what_the_official_one_says(files, tmp_path):
    AutoTokenizer.from_pretrained(files).save_pretrained(tmp_path / "saved")
    official = read_config()
    saved = read_config(tmp_path / "saved")
    del official["auto_map"]  # names a file of remote code that is not in the saved directory
    assert official.items() <= saved.items()
    assert "auto_map" not in saved
    assert str(tmp_path) not in json.dumps(saved)


def test_a_pickled_tokenizer_gives_the_same_ids(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy("描述 <|user|>").input_ids == tokenizer("描述 <|user|>").input_ids
    assert copy.image_size == 56


def test_tiktoken_need_not_be_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    monkeypatch.setitem(sys.modules, "tiktoken.load", None)
    assert ChatGLM4Tokenizer.from_pretrained(GOLDEN)("a").input_ids == PREFIX_IDS + [97]


def test_a_large_vocabulary_is_not_taken_for_a_mistral_model(files, library_log):
    # 5.17 warns and may replace the split pattern above 100,000 tokens when config.json has no
    # version.
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes([first, second]) for first in range(256) for second in range(256)]
    tokens += [bytes([0, first, second]) for first in range(256) for second in range(150)]
    write_vocabulary(files / "tokenizer.model", tokens)
    shutil.copyfile(CONFIG_JSON, files / "config.json")
    write_config(files, read_config() | {"added_tokens_decoder": special_tokens_from(len(tokens))})
    loaded = AutoTokenizer.from_pretrained(files)
    assert len(loaded) > 100_000
    assert library_log.text == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"AA== 0\nAQ== 1\n", "no token for 254 of the 256"),
        (b"AA== 0\nAQ== 2\n", "entry 2: b'AQ== 2'"),
        (b"AA== 0\nAA== 1\n", "entry 2"),
        (b"AA== 0\n!!! 1\n", "entry 2"),
        (b"AA== 0\nA!Q== 1\n", "entry 2"),
        (b"AA== 0\nAQ==\n", "entry 2"),
        (b"", "no token for 256"),
    ],
)
def test_a_damaged_vocabulary_is_refused_with_the_place(files, content, message):
    (files / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        AutoTokenizer.from_pretrained(files)


def test_a_missing_vocabulary_is_named(files):
    (files / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.model was not found"):
        AutoTokenizer.from_pretrained(files)


def test_a_special_token_whose_id_does_not_fit_the_vocabulary_is_refused(files):
    write_config(files, read_config() | {"added_tokens_decoder": special_tokens_from(513)})
    with pytest.raises(ValueError, match=r"gives <\|endoftext\|> the id 513, but .* it is 512"):
        AutoTokenizer.from_pretrained(files)


def test_a_missing_special_token_is_named(files):
    config = read_config()
    del config["added_tokens_decoder"]["519"]
    write_config(files, config)
    with pytest.raises(ValueError, match=r"has no <\|user\|>"):
        AutoTokenizer.from_pretrained(files)
