"""The miniature's tokenizer files, in the official formats: ``tokenizer.model`` and
``tokenizer_config.json``.

The 256 bytes come first, then merges learned from the words of the question grammar, so that each
word of the grammar is one token and any other text still encodes, byte by byte.
"""

import base64
import json
import re
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tools.miniature.questions import CHINESE, PLURALS, QUESTIONS
from tools.miniature.scenes import CELLS, COLOURS, SHAPES

# In the official order and number; their ids follow the ordinary ones.
SPECIAL_TOKENS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>",
    "<|assistant|>", "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>",
    "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip
ANSWER_WORDS = "a an at in on the yes no nothing there is object objects shapes and or of".split()
CHINESE_WORDS = (
    "物体 什么 形状 颜色 图中 图片 图 的 是 有 没有 吗 几个 多少 个 数一数 在 哪里 位置 哪个 更大"
    " 和 还是 描述 "
    "这张 这 请 你 看到了 一个 什么都没有 有没有"
).split()


def grammar_words() -> list[str]:
    """Every English word, with and without a leading space and a capital, and every Chinese
    word."""
    english = {*ANSWER_WORDS, *SHAPES, *PLURALS.values(), *COLOURS, *" ".join(CELLS).split()}
    for forms in QUESTIONS.values():
        for form in forms["en"]:
            english.update(re.findall(r"[A-Za-z]+", re.sub(r"\{.\}", " ", form)))
    cased = {form for word in english for form in (word, word.lower(), word.capitalize())}
    words = {space + word for word in cased for space in ("", " ")}
    words.update(CHINESE_WORDS, CHINESE.values(), "？。，")
    return sorted(words)


def learn_ranks(size: int = 1400) -> dict[bytes, int]:
    """Token bytes to rank: the bytes, then at most ``size - 256`` merges learned from the grammar's
    words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=1,
        initial_alphabet=alphabet,
        show_progress=False,
        special_tokens=[],
    )
    tokenizer.train_from_iterator(grammar_words(), trainer)
    to_byte = _byte_of_character()
    learned = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    ranks = {bytes([value]): value for value in range(256)}
    for text, _ in learned:
        token = bytes(to_byte[character] for character in text)
        ranks.setdefault(token, len(ranks))
    return ranks


def save_vocabulary(directory: Path, image_size: int) -> dict[str, int]:
    """Write the tokenizer files.

    Args:
        directory: of the checkpoint; made if missing.
        image_size: side of the square the model sees, in pixels.

    Returns:
        Special token to id.
    """
    directory.mkdir(parents=True, exist_ok=True)
    ranks = learn_ranks()
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (directory / "tokenizer.model").write_text("".join(lines), encoding="ascii")
    ids = {token: len(ranks) + index for index, token in enumerate(SPECIAL_TOKENS)}
    flags = {
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    config = {
        "added_tokens_decoder": {
            str(number): {"content": token, **flags} for token, number in ids.items()
        },
        "additional_special_tokens": list(SPECIAL_TOKENS),
        "clean_up_tokenization_spaces": False,
        "do_lower_case": False,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "image_size": image_size,
        "model_max_length": 1_000_000,
        "padding_side": "left",
        "remove_space": False,
        "tokenizer_class": "ChatGLM4Tokenizer",
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return ids


def _byte_of_character() -> dict[str, int]:
    """Undo the byte-level alphabet: printable bytes stand for themselves, the rest are moved up."""
    kept = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    moved = [value for value in range(256) if value not in kept]
    return {
        **{chr(value): value for value in kept},
        **{chr(256 + index): value for index, value in enumerate(moved)},
    }
