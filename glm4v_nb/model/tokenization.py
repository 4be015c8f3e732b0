"""Tokenizer of GLM-4V-9B, built from the official tiktoken-format ``tokenizer.model``.

The split pattern and the rebuilding of merges from ranks are transformers' own
``TikTokenConverter``; the result is a fast tokenizer whose ids equal those of tiktoken, the library
the original code uses.
"""

import base64
import binascii
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field
from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from glm4v_nb.model import chat
from glm4v_nb.model.checkpoint_files import Positive, Size, check_auto_map, check_values

END_OF_TEXT = "<|endoftext|>"
REQUIRED_SPECIAL_TOKENS = [*chat.PREFIX, *chat.IMAGE_TOKENS]
REQUIRED_SPECIAL_TOKENS += [f"<|{role}|>" for role in chat.ROLES]


def read_ranks(vocab_file) -> dict[bytes, int]:
    """Ranks 0..n-1 of a tiktoken vocabulary by token: one ``base64(token) rank`` a line.

    Raises:
        ValueError: the file is missing, a Git LFS pointer, or no complete tiktoken vocabulary.
    """
    if vocab_file is None or not Path(vocab_file).is_file():
        raise ValueError(
            f"tokenizer.model was not found ({vocab_file}). The tokenizer is built from this file"
            " of the checkpoint. Download it into the checkpoint's directory."
        )
    content = Path(vocab_file).read_bytes()
    if content.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{vocab_file} is a Git LFS pointer, not the vocabulary itself. Run `git lfs pull` in"
            " the checkpoint's directory, or download the file again."
        )
    ranks = {}
    for number, line in enumerate(filter(None, content.splitlines())):
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error):
            token, rank = b"", -1
        if not token or rank != number or token in ranks:
            raise ValueError(
                f"{vocab_file}, entry {number + 1}: {line[:60]!r} is not a new base64 token"
                f" followed by its rank {number}. Expected tiktoken's format. Download the file"
                " again."
            )
        ranks[token] = rank
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"{vocab_file} has no token for {len(missing)} of the 256 single bytes (the first is "
            f"{missing[0]}): it is truncated or not a tiktoken vocabulary. Download the file again."
        )
    return ranks


class _RanksConverter(TikTokenConverter):
    # tiktoken's own reader keeps copies, found again by path alone: a changed file is ignored.
    load_tiktoken_bpe = staticmethod(read_ranks)


class _TokenizerFile(BaseModel, arbitrary_types_allowed=True):
    """What is read of tokenizer_config.json and would fail only later, or elsewhere."""

    image_size: Size | None = None
    model_input_names: list[str] = Field(["input_ids", "attention_mask"], min_length=2)
    model_max_length: Positive | None = None
    padding_side: Literal["left", "right"] = "left"
    pad_token: str | AddedToken


class ChatGLM4Tokenizer(PreTrainedTokenizerFast):
    """The tokenizer that the official tokenizer_config.json names as its ``tokenizer_class``.

    ``tokenizer(text)`` puts ``[gMASK]<sop>`` in front, as the original does; with
    ``add_special_tokens=False`` it adds nothing. Text that spells a special token stays ordinary
    text, whoever typed it. Padding goes to the left.

    Args:
        vocab_file: path of ``tokenizer.model``.
        added_tokens_decoder: special token by id, as in tokenizer_config.json; the ids follow the
            vocabulary's last rank without a gap.
        image_size: side of the square the model sees, in pixels, or None if not stated.

    Raises:
        ValueError: the vocabulary is damaged, a special token is missing or cannot have its id.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(self, vocab_file=None, added_tokens_decoder=None, image_size=None, **kwargs):
        backend = _RanksConverter(vocab_file=vocab_file).converted()
        special_tokens = _special_tokens(added_tokens_decoder)
        for token in special_tokens.values():
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        for token_id, token in special_tokens.items():
            here = backend.token_to_id(token.content)
            if here != token_id:
                raise ValueError(
                    f"tokenizer_config.json gives {token.content} the id {token_id}, but with this"
                    f" tokenizer.model it is {here}. Special tokens follow the vocabulary's last"
                    " rank without a gap. Take both files from the same checkpoint."
                )
        named = (*chat.PREFIX, END_OF_TEXT)
        backend.post_processor = processors.TemplateProcessing(
            single=[*chat.PREFIX, "$A"],
            pair=[*chat.PREFIX, "$A", "$B", END_OF_TEXT],
            special_tokens=[(name, backend.token_to_id(name)) for name in named],
        )
        self._tokenizer = backend

        # The file's "auto_map" names remote code that this class replaces.
        check_auto_map("tokenizer_config.json", kwargs.pop("auto_map", None))
        defaults = dict.fromkeys(("pad_token", "eos_token"), END_OF_TEXT)
        defaults["split_special_tokens"] = True
        kwargs |= {"added_tokens_decoder": special_tokens, "image_size": image_size}
        check_values("tokenizer_config.json", _TokenizerFile, defaults | kwargs)
        super().__init__(vocab_file=vocab_file, **defaults | kwargs)
        self.image_size = image_size

    @classmethod
    def convert_to_native_format(cls, **kwargs):
        """Leave the files to ``__init__``: tokenizer.model is no SentencePiece model."""
        ignored = ("tokenizer_file", "trust_remote_code")
        return {name: value for name, value in kwargs.items() if name not in ignored}

    @classmethod
    def _patch_mistral_regex(cls, tokenizer, *args, **kwargs):
        # The base class would ask, over the network for a hub id, whether this is a Mistral model;
        # 5.17 takes a config.json without its version for one.
        return tokenizer

    def _encode_plus(self, text, text_pair=None, **kwargs):
        chat.refuse_pictures(
            kwargs, "The tokenizer reads text only: call AutoProcessor's processor(image, text)."
        )
        texts = _replace_lone_surrogates((text, text_pair))
        for one in texts[0] if isinstance(texts[0], list) else texts[:1]:
            if isinstance(one, str):
                chat.refuse_rendered(one)
        return super()._encode_plus(*texts, **kwargs)

    def ordinary_ids(self, text: str) -> list[int]:
        """Ids of a text, whatever it spells, with nothing in front: no special token among them."""
        text = _replace_lone_surrogates(text)
        options = {"add_special_tokens": False, "split_special_tokens": True}
        return super()._encode_plus(text, **options)["input_ids"]

    def apply_chat_template(
        self,
        conversation,
        *,
        add_generation_prompt=False,
        continue_final_message=False,
        tokenize=True,
        return_tensors=None,
        return_dict=True,
        sanitize_control_tokens=True,
        **options,
    ):
        """Turn one conversation, or a list of conversations, into ids.

        Special-token text in a message stays ordinary text (``sanitize_control_tokens`` is accepted
        and always true). An image takes the three ids begin-of-image, placeholder, end-of-image;
        its pixels come from the processor.

        Args:
            conversation: messages, as ``chat.parse_conversation`` takes them, or a list of such.
            add_generation_prompt: end with ``<|assistant|>``.
            continue_final_message: excludes ``add_generation_prompt``; nothing closes a message.
            tokenize: False gives readable text, which cannot be turned back into a prompt.
            return_tensors, return_dict: as in transformers.
            options: those of ``pad``, as max_length; others that transformers has are refused.

        Returns:
            ``BatchEncoding`` with ``input_ids`` and ``attention_mask``, each a list of length L for
            one conversation, a list of lists for several, or a tensor [n, L] with
            ``return_tensors``. Only the ids with ``return_dict=False``; str or list[str] with
            ``tokenize=False``.

        Raises:
            ValueError, TypeError: as ``chat.parse_conversation``; an option this format has not.
        """
        chat.refuse_options(options)
        if add_generation_prompt and continue_final_message:
            raise ValueError(
                "add_generation_prompt and continue_final_message are both set. The model either"
                " starts a new message or continues the last one. Set one of them."
            )
        batched = chat.is_batch(conversation)
        parsed = map(chat.parse_conversation, conversation if batched else [conversation])
        prompts = [chat.prompt_pieces(messages, add_generation_prompt) for messages in parsed]
        if not tokenize:
            texts = ["".join(text for _, text in pieces) for pieces in prompts]
            return texts if batched else texts[0]
        rows = [self._ids_of(pieces) for pieces in prompts]
        ids = {"input_ids": rows if batched or return_tensors else rows[0]}
        encoded = self.pad(ids, return_tensors=return_tensors, **{"padding": False} | options)
        return encoded if return_dict else encoded["input_ids"]

    def _ids_of(self, pieces: list[tuple[bool, str]]) -> list[int]:
        ids = []
        for is_special, text in pieces:
            ids += [self.convert_tokens_to_ids(text)] if is_special else self.ordinary_ids(text)
        return ids

    def _save_pretrained(
        self, save_directory, file_names, legacy_format=None, filename_prefix=None
    ):
        # The base class would write a tokenizer.json and leave the special tokens' ids to it. The
        # official layout is tokenizer.model, copied as it is, and the ids in tokenizer_config.json.
        config_file = Path(file_names[0])
        config = json.loads(config_file.read_text(encoding="utf-8"))
        for not_official in ("backend", "is_local", "local_files_only"):
            config.pop(not_official, None)
        config["additional_special_tokens"] = config.pop("extra_special_tokens", [])
        added = self.added_tokens_decoder.items()
        config["added_tokens_decoder"] = {str(key): token.__getstate__() for key, token in added}
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        config_file.write_text(text, encoding="utf-8")
        return (*file_names, *self.save_vocabulary(str(save_directory), filename_prefix))


def _special_tokens(added_tokens_decoder) -> dict[int, AddedToken]:
    given = {int(token_id): token for token_id, token in (added_tokens_decoder or {}).items()}
    tokens = {number: _added_token(given[number]) for number in sorted(given)}
    contents = {token.content for token in tokens.values()}
    missing = [name for name in REQUIRED_SPECIAL_TOKENS if name not in contents]
    if missing:
        raise ValueError(
            f"tokenizer_config.json: added_tokens_decoder has no {', '.join(missing)}. A"
            " conversation with this model needs them. Put the official tokenizer_config.json"
            " beside tokenizer.model."
        )
    return tokens


def _added_token(given) -> AddedToken:
    if isinstance(given, dict):
        given = AddedToken(**{name: value for name, value in given.items() if name != "id"})
    content = getattr(given, "content", str(given))
    if content not in REQUIRED_SPECIAL_TOKENS and getattr(given, "special", True) is False:
        return given  # a user added it to be found in text
    # Special, or typed text that spells one would become the token.
    return AddedToken(content, special=True, normalized=False)


def _replace_lone_surrogates(text):
    """Do what tiktoken does with half an emoji: U+FFFD in its place."""
    if isinstance(text, (list, tuple)):
        return [_replace_lone_surrogates(part) for part in text]
    if isinstance(text, str):
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
