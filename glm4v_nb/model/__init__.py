"""GLM-4V-9B as native transformers classes; ``register`` makes the Auto classes load the official
layout."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from glm4v_nb.model.checkpoint import register_official_layout
from glm4v_nb.model.configuration import (
    OFFICIAL_CHECKPOINTS,
    GLM4VConfig,
    GLM4VVisionConfig,
    official_config,
)
from glm4v_nb.model.modeling import GLM4VForConditionalGeneration
from glm4v_nb.model.processing import register_processing
from simgpu.checkpoints import register_config

__all__ = [
    "GLM4VConfig",
    "GLM4VForConditionalGeneration",
    "GLM4VVisionConfig",
    "official_config",
    "register",
]


def register():
    """Make transformers' Auto classes for configs, models, tokenizers and processors know
    GLM-4V-9B, and simulated cards its configuration."""
    AutoConfig.register(GLM4VConfig.model_type, GLM4VConfig, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        auto_class.register(GLM4VConfig, GLM4VForConditionalGeneration, exist_ok=True)
    for checkpoint in OFFICIAL_CHECKPOINTS:
        register_config(checkpoint, official_config)
    register_official_layout(GLM4VForConditionalGeneration.__name__)
    register_processing(GLM4VConfig)
