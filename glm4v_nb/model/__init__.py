"""GLM-4V-9B as native transformers classes; importing it registers them."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from glm4v_nb.model.configuration import (
    OFFICIAL_CHECKPOINTS,
    GLM4VConfig,
    GLM4VVisionConfig,
    leave_text_only_checkpoints,
    official_config,
)
from glm4v_nb.model.modeling import GLM4VForConditionalGeneration
from glm4v_nb.model.official_names import register_official_layout, understand_official_names
from glm4v_nb.model.processing import register_processing
from glm4v_nb.model.splicing import expand_batches_of_trainer
from simgpu.checkpoints import register_config

__all__ = ["GLM4VConfig", "GLM4VForConditionalGeneration", "GLM4VVisionConfig", "official_config"]

AutoConfig.register(GLM4VConfig.model_type, GLM4VConfig, exist_ok=True)
for _auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
    _auto_class.register(GLM4VConfig, GLM4VForConditionalGeneration, exist_ok=True)
for _checkpoint in OFFICIAL_CHECKPOINTS:
    register_config(_checkpoint, official_config)
register_official_layout(GLM4VForConditionalGeneration.__name__)
register_processing(GLM4VConfig)
understand_official_names()
expand_batches_of_trainer()
leave_text_only_checkpoints()
