"""Configuration of GLM-4V-9B, read from and written to the official ``config.json`` layout.

The official file keeps the text decoder's sizes as flat keys ("num_layers", "ffn_hidden_size", ...)
beside a nested "vision_config". Both are kept exactly so; the ``text_config`` that transformers'
``GlmModel`` needs is derived from the flat keys and never written.

Source of names and values: config.json of zai-org/glm-4v-9b (formerly THUDM/glm-4v-9b).
"""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, InstanceOf
from transformers import AutoConfig, GlmConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging
from wrapt import wrap_function_wrapper

from glm4v_nb.model.checkpoint_files import (
    Flag,
    LayerCount,
    Positive,
    Quantiser,
    Size,
    TokenId,
    check_auto_map,
    check_values,
    guarded,
    reading,
    schema_of,
)
from simgpu.checkpoints import file_in, read_json

CONFIG_DIRECTORY = Path(__file__).parent / "configs"
# Hub ids of the official checkpoint, whose config ships with this package.
OFFICIAL_CHECKPOINTS = ("zai-org/glm-4v-9b", "THUDM/glm-4v-9b")
OFFICIAL = OFFICIAL_CHECKPOINTS[0]

logger = logging.get_logger(__name__)


class GLM4VVisionConfig(PreTrainedConfig):
    """The EVA2-CLIP-E image tower; sizes count features, pixels or positions."""

    model_type = "glm4v_eva2_clip"
    base_config_key = "vision_config"

    hidden_size: Size = 1792
    num_hidden_layers: LayerCount = 63
    num_heads: Size = 16
    intermediate_size: Size = 15360
    patch_size: Size = 14
    image_size: Size = 1120
    in_channels: Size = 3
    num_positions: Size = 6401
    hidden_act: Literal["gelu"] = "gelu"
    layer_norm_eps: Positive = 1e-6
    dropout_prob: float = 0.0
    scaling_factor: Positive = 8.0

    def __post_init__(self, **kwargs):
        check_values("config.json, vision_config", _VISION_VALUES, vars(self))
        super().__post_init__(**kwargs)
        positions = self.patches_per_side**2 + 1
        faults = {
            f"image_size {self.image_size} is not a multiple of two patches of {self.patch_size}"
            " pixels. The tower halves its patch grid, so the grid must be even. Use a multiple of"
            f" {2 * self.patch_size}.": self.image_size % (2 * self.patch_size),
            f"num_positions is {self.num_positions}, but image_size {self.image_size} and"
            f" patch_size {self.patch_size} make {positions} (patches and one CLS). Correct one of"
            " the three.": self.num_positions != positions,
            f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}. Each"
            " head needs the same number of features.": self.hidden_size % self.num_heads,
            f"dropout_prob is {self.dropout_prob}. Only 0.0, the value of every released"
            " checkpoint, is implemented. Set it to 0.0.": self.dropout_prob,
        }
        for fault, found in faults.items():
            if found:
                raise ValueError(f"config.json, vision_config: {fault}")

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of the image: 80 for GLM-4V-9B."""
        return self.image_size // self.patch_size

    @property
    def image_tokens(self) -> int:
        """Positions of an image in the decoder: halved grid, begin- and end-of-image (1602)."""
        return (self.patches_per_side // 2) ** 2 + 2


OFFICIAL_VISION_KEYS = tuple(sorted(GLM4VVisionConfig.__annotations__))
_VISION_VALUES = schema_of(GLM4VVisionConfig)
# What other ChatGLM checkpoints may have and GLM-4V-9B has not.
_FIXED = dict(multi_query_attention=True, rmsnorm=True, post_layer_norm=True, original_rope=True)
_FIXED |= dict(add_bias_linear=False, tie_word_embeddings=False)
# Keys of config.json besides the fields: read, or kept because the official file has them. Others
# are not: transformers acts on some, fetching code or taking memory.
_OTHER_KEYS = {"architectures", "auto_map", "dtype", "torch_dtype", "model_type"}
_OTHER_KEYS |= {"transformers_version", "_name_or_path", "quantization_config"}
_OTHER_KEYS |= {"attn_implementation", "_attn_implementation", "return_dict", "interleaved_qkv"}
_OTHER_KEYS |= {"output_attentions", "output_hidden_states", "apply_query_key_layer_scaling"}
_OTHER_KEYS |= {"apply_residual_connection_post_layernorm", "attention_dropout", "pre_seq_len"}
_OTHER_KEYS |= {"attention_softmax_in_fp32", "bias_dropout_fusion", "classifier_dropout"}
_OTHER_KEYS |= {"fp32_residual_connection", "hidden_dropout", "prefix_projection"}


_Dtype = Literal["bfloat16", "float16", "float32", "float64"] | InstanceOf[torch.dtype] | None
_DTYPES = ("bfloat16", "float16", "half", "float32", "float", "float64", "double")


class _OtherKeys(BaseModel):
    """What transformers acts on in a config.json, beside the fields."""

    vision_config: dict | InstanceOf[PreTrainedConfig]
    dtype: _Dtype = None
    torch_dtype: _Dtype = None
    quantization_config: Quantiser | None = None


class TextOnlyChatGLM(ValueError):
    """A checkpoint of the same model_type that is another model: glm-4-9b-chat, chatglm3."""


class GLM4VConfig(PreTrainedConfig):
    """Configuration of the whole model; field names are the official ones.

    ``text_config`` (a ``GlmConfig``) is derived from the flat fields when the object is made, and
    again when a model is made of it.
    """

    model_type = "chatglm"
    sub_configs = {"text_config": GlmConfig, "vision_config": GLM4VVisionConfig}
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "vocab_size": "padded_vocab_size",
        "intermediate_size": "ffn_hidden_size",
        "max_position_embeddings": "seq_length",
        "num_key_value_heads": "multi_query_group_num",
        "head_dim": "kv_channels",
    }

    num_layers: LayerCount = 40
    padded_vocab_size: Size = 151552
    hidden_size: Size = 4096
    ffn_hidden_size: Size = 13696
    kv_channels: Size = 128
    num_attention_heads: Size = 32
    multi_query_attention: Flag = True
    multi_query_group_num: Size = 2
    seq_length: Size = 8192
    layernorm_epsilon: Positive = 1.5625e-07
    rmsnorm: Flag = True
    post_layer_norm: Flag = True
    add_bias_linear: Flag = False
    add_qkv_bias: Flag = True
    original_rope: Flag = True
    rope_ratio: Positive = 1
    boi_token_id: TokenId = 151339
    eoi_token_id: TokenId = 151340
    pad_token_id: TokenId = 151329
    eos_token_id: TokenId | list[TokenId] | None = None
    use_cache: Flag = True
    tie_word_embeddings: Flag = False
    initializer_range: Positive = 0.02
    vision_config: Any = None
    text_config: Any = None

    def __post_init__(self, **kwargs):
        if self.eos_token_id is None:
            self.eos_token_id = [151329, 151336, 151338]
        check_values("config.json", _VALUES, vars(self))
        for name, value in _FIXED.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"config.json: {name} is {getattr(self, name)}; GLM-4V-9B has {value} and"
                    " nothing else is implemented. Load a GLM-4V-9B checkpoint."
                )
        if self.num_attention_heads % self.multi_query_group_num:
            raise ValueError(
                f"config.json: num_attention_heads is {self.num_attention_heads}, which"
                f" multi_query_group_num {self.multi_query_group_num} does not divide. Each group"
                " of heads shares one key. Download config.json again."
            )
        for name in ("boi_token_id", "eoi_token_id", "pad_token_id"):
            if getattr(self, name) >= self.padded_vocab_size:
                raise ValueError(
                    f"config.json: {name} is {getattr(self, name)}, but padded_vocab_size is"
                    f" {self.padded_vocab_size}. Expected an id below it. Download it again."
                )
        if not isinstance(self.vision_config, PreTrainedConfig):
            given = self.vision_config or {}
            known = {name: given[name] for name in OFFICIAL_VISION_KEYS if name in given}
            self.vision_config = GLM4VVisionConfig(**known)
        self.text_config = GlmConfig(**self.decoder_fields())
        super().__post_init__(**kwargs)

    def decoder_fields(self) -> dict:
        """The decoder's part of this configuration, as arguments of ``GlmConfig``."""
        rope = {"rope_type": "default", "rope_theta": 10000.0 * self.rope_ratio}
        return {name: getattr(self, official) for name, official in self.attribute_map.items()} | {
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "rms_norm_eps": self.layernorm_epsilon,
            "attention_bias": self.add_qkv_bias,
            "initializer_range": self.initializer_range,
            "tie_word_embeddings": False,
            "pad_token_id": self.pad_token_id,
            "eos_token_id": self.eos_token_id,
            "rope_parameters": rope | {"partial_rotary_factor": 0.5},
        }

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Build from the official JSON keys; ``kwargs`` override them.

        Keys that are neither fields nor in the official file are left out, and logged.

        Raises:
            TextOnlyChatGLM: there is no "vision_config".
            ValueError: a value is of a wrong type or beyond all sense, or names code to fetch.
        """
        if config_dict.get("vision_config") is None:
            raise TextOnlyChatGLM(
                'config.json has model_type "chatglm" but no "vision_config": this is a text-only'
                " ChatGLM checkpoint (glm-4-9b-chat or chatglm3, say), and GLM-4V-9B was expected."
                " Load zai-org/glm-4v-9b, or use transformers' own Glm classes for text-only"
                " models."
            )
        check_dtype(kwargs)
        check_auto_map("config.json", config_dict.get("auto_map"))
        check_values("config.json", _OtherKeys, config_dict)
        for name in ("attn_implementation", "_attn_implementation"):
            if config_dict.get(name) not in (None, "sdpa", "eager"):
                refuse_attention(config_dict[name])
        unknown = config_dict.keys() - _OTHER_KEYS - cls.__dataclass_fields__.keys()
        if unknown:
            logger.warning_once(f"config.json: not read: {', '.join(sorted(unknown))}.")
        known = _OTHER_KEYS | cls.__annotations__.keys()
        config_dict = {name: value for name, value in config_dict.items() if name in known}
        config_dict.pop("text_config", None)
        # transformers assigns overrides to the finished object, too late for text_config.
        for key in list(kwargs):
            name = cls.attribute_map.get(key, key)
            if name in cls.__annotations__:
                value = kwargs.pop(key)
                if name == "vision_config" and isinstance(value, dict):
                    value = {**config_dict[name], **value}
                config_dict[name] = value
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self):
        """The official flat layout: no ``text_config``, and the official architecture name."""
        output = super().to_dict()
        output.pop("text_config", None)
        output["architectures"] = ["ChatGLMModel"]
        vision = output["vision_config"]
        output["vision_config"] = {name: vision[name] for name in OFFICIAL_VISION_KEYS}
        return output


_VALUES = schema_of(GLM4VConfig)


def check_dtype(options: dict):
    """Take "torch." off the name of a type in the arguments of ``from_pretrained``.

    Raises:
        ValueError: a type that weights cannot have here, or text that names none and is not "auto".
    """
    for key in {"dtype", "torch_dtype"} & options.keys():
        if isinstance(options[key], str):
            options[key] = options[key].removeprefix("torch.")
        name = str(options[key]).removeprefix("torch.")
        if isinstance(options[key], str | torch.dtype) and name not in (*_DTYPES, "auto"):
            raise ValueError(
                f"{key} is {options[key]!r}; expected torch.bfloat16, torch.float16, torch.float32,"
                ' one of these names as text ("bfloat16"), or "auto".'
            )


def refuse_attention(attention):
    """Raise the ValueError for an attention that is not here."""
    raise ValueError(
        f'attn_implementation is {attention!r:.100}. Expected "sdpa" or "eager": nothing is'
        ' fetched from the hub, and with "sdpa", the default, PyTorch picks its own flash attention'
        " where the card has one. Leave the argument out, also of config.json."
    )


def leave_text_only_checkpoints():
    """Let AutoConfig read other checkpoints of model_type "chatglm" where their code may run:
    with ``trust_remote_code=True`` their own code is what was asked for."""

    def from_pretrained(wrapped, _, args, kwargs):
        try:
            return wrapped(*args, **kwargs)
        except TextOnlyChatGLM:
            if not kwargs.get("trust_remote_code"):
                raise
        registered = CONFIG_MAPPING._extra_content.pop(GLM4VConfig.model_type)
        try:
            return wrapped(*args, **kwargs)
        finally:
            CONFIG_MAPPING.register(GLM4VConfig.model_type, registered, exist_ok=True)

    wrap_function_wrapper(AutoConfig, "from_pretrained", from_pretrained)
    wrap_function_wrapper(AutoConfig, "from_pretrained", guarded("config.json"))


def official_config() -> GLM4VConfig:
    """The full-size GLM-4V-9B configuration shipped with this package; needs no network."""
    return GLM4VConfig.from_pretrained(CONFIG_DIRECTORY / "glm-4v-9b")


def read_config(checkpoint: str | Path, **overrides) -> GLM4VConfig:
    """The configuration of a checkpoint, without a download: of the official hub id, whose config
    ships with this package, or of a directory with a config.json.

    Raises:
        ValueError: neither of these, or the configuration of another model.
    """
    if str(checkpoint) in OFFICIAL_CHECKPOINTS:
        return official_config()
    path = file_in(Path(checkpoint), "config.json")
    if not path.is_file():
        raise ValueError(
            f"checkpoint is {str(checkpoint)!r}; expected {OFFICIAL!r}, whose config ships with"
            " glm4v_nb, or a directory with a GLM-4V-9B config.json. Download other checkpoints and"
            " give the directory."
        )
    content = read_json(path)
    check_auto_map(str(path), content.get("auto_map"))
    if content.get("model_type") != GLM4VConfig.model_type:
        raise ValueError(
            f"{path} has model_type {content.get('model_type')!r:.60}; expected"
            f" {GLM4VConfig.model_type!r}, a GLM-4V-9B. Give the directory of such a checkpoint."
        )
    known = {*GLM4VConfig.__annotations__, *GLM4VConfig.attribute_map} & overrides.keys()
    with reading(path):
        return GLM4VConfig.from_dict(content, **{name: overrides[name] for name in known})
