"""Configuration of GLM-4V-9B, read from and written to the official ``config.json`` layout.

The official file keeps the text decoder's sizes as flat keys ("num_layers", "ffn_hidden_size", ...)
beside a nested "vision_config". Both are kept exactly so; the ``text_config`` that transformers'
``GlmModel`` needs is derived from the flat keys and never written.

Source of names and values: config.json of zai-org/glm-4v-9b (formerly THUDM/glm-4v-9b).
"""

from pathlib import Path

import torch
from transformers import AutoConfig, GlmConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from wrapt import wrap_function_wrapper

CONFIG_DIRECTORY = Path(__file__).parent / "configs"
# Hub ids of the official checkpoint, whose config ships with this package.
OFFICIAL_CHECKPOINTS = ("zai-org/glm-4v-9b", "THUDM/glm-4v-9b")
OFFICIAL = OFFICIAL_CHECKPOINTS[0]


class GLM4VVisionConfig(PreTrainedConfig):
    """The EVA2-CLIP-E image tower; sizes count features, pixels or positions."""

    model_type = "glm4v_eva2_clip"
    base_config_key = "vision_config"

    hidden_size: int = 1792
    num_hidden_layers: int = 63
    num_heads: int = 16
    intermediate_size: int = 15360
    patch_size: int = 14
    image_size: int = 1120
    in_channels: int = 3
    num_positions: int = 6401
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    dropout_prob: float = 0.0
    scaling_factor: float = 8.0

    def __post_init__(self, **kwargs):
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
# What other ChatGLM checkpoints may have and GLM-4V-9B has not.
_FIXED = dict(multi_query_attention=True, rmsnorm=True, post_layer_norm=True, original_rope=True)
_FIXED |= dict(add_bias_linear=False, tie_word_embeddings=False)


class TextOnlyChatGLM(ValueError):
    """A checkpoint of the same model_type that is another model: glm-4-9b-chat, chatglm3."""


class GLM4VConfig(PreTrainedConfig):
    """Configuration of the whole model; field names are the official ones.

    ``text_config`` (a ``GlmConfig``) is derived from the flat fields when the object is made. To
    change the decoder, make a new configuration instead of assigning to a field.
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

    num_layers: int = 40
    padded_vocab_size: int = 151552
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    kv_channels: int = 128
    num_attention_heads: int = 32
    multi_query_attention: bool = True
    multi_query_group_num: int = 2
    seq_length: int = 8192
    layernorm_epsilon: float = 1.5625e-07
    rmsnorm: bool = True
    post_layer_norm: bool = True
    add_bias_linear: bool = False
    add_qkv_bias: bool = True
    original_rope: bool = True
    rope_ratio: float | int = 1
    boi_token_id: int = 151339
    eoi_token_id: int = 151340
    pad_token_id: int = 151329
    eos_token_id: int | list[int] | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs):
        for name, value in _FIXED.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"config.json: {name} is {getattr(self, name)}; GLM-4V-9B has {value} and"
                    " nothing else is implemented. Load a GLM-4V-9B checkpoint."
                )
        if self.eos_token_id is None:
            self.eos_token_id = [151329, 151336, 151338]
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = GLM4VVisionConfig(**(self.vision_config or {}))
        rope = {"rope_type": "default", "rope_theta": 10000.0 * self.rope_ratio}
        self.text_config = GlmConfig(
            **{name: getattr(self, official) for name, official in self.attribute_map.items()},
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            rms_norm_eps=self.layernorm_epsilon,
            attention_bias=self.add_qkv_bias,
            initializer_range=self.initializer_range,
            tie_word_embeddings=False,
            pad_token_id=self.pad_token_id,
            eos_token_id=self.eos_token_id,
            rope_parameters=rope | {"partial_rotary_factor": 0.5},
        )
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Build from the official JSON keys; ``kwargs`` override them.

        Raises:
            TextOnlyChatGLM: there is no "vision_config".
        """
        if config_dict.get("vision_config") is None:
            raise TextOnlyChatGLM(
                'config.json has model_type "chatglm" but no "vision_config": this is a text-only'
                " ChatGLM checkpoint (glm-4-9b-chat or chatglm3, say), and GLM-4V-9B was expected."
                " Load zai-org/glm-4v-9b, or use transformers' own Glm classes for text-only"
                " models."
            )
        check_dtype(kwargs.get("dtype", kwargs.get("torch_dtype")))
        # transformers assigns overrides to the finished object, too late for text_config.
        config_dict = dict(config_dict)
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


def check_dtype(dtype):
    """Raise ValueError for text that names no type of torch, and is not "auto"."""
    if isinstance(dtype, str) and dtype != "auto":
        if not isinstance(getattr(torch, dtype.removeprefix("torch."), None), torch.dtype):
            raise ValueError(
                f"dtype is {dtype!r}; expected torch.bfloat16, torch.float16, torch.float32, one of"
                ' these names as text ("bfloat16"), or "auto".'
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


def official_config() -> GLM4VConfig:
    """The full-size GLM-4V-9B configuration shipped with this package; needs no network."""
    return GLM4VConfig.from_pretrained(CONFIG_DIRECTORY / "glm-4v-9b")


def read_config(checkpoint: str | Path) -> GLM4VConfig:
    """The configuration of a checkpoint, without a download: of the official hub id, whose config
    ships with this package, or of a directory with a config.json.

    Raises:
        ValueError: neither of these, or the configuration of another model.
    """
    if str(checkpoint) in OFFICIAL_CHECKPOINTS:
        return official_config()
    if not Path(checkpoint).is_dir():
        raise ValueError(
            f"checkpoint is {str(checkpoint)!r}; expected {OFFICIAL_CHECKPOINTS[0]!r}, whose config"
            " ships with glm4v_nb, or a directory with a GLM-4V-9B config.json. Download other"
            " checkpoints and give the directory."
        )
    config = AutoConfig.from_pretrained(checkpoint)
    if not isinstance(config, GLM4VConfig):
        raise ValueError(
            f"{checkpoint}/config.json has model_type {config.model_type!r}; expected"
            f" {GLM4VConfig.model_type!r}, a GLM-4V-9B. Give the directory of such a checkpoint."
        )
    return config
