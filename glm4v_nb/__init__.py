"""Run GLM-4V-9B on several GPUs, real or simulated.

Importing it registers the model with transformers: at once where transformers is loaded already,
else when it is. So the command line can say --help without waiting for torch.
"""

from importlib import import_module

from wrapt import when_imported

from simgpu.checkpoints import register_recipe  # simgpu says so where neither was tried

__version__ = "0.1.0"


def _recipe(config):
    return import_module("glm4v_nb.workload").GLM4VRecipe(config)  # imports torch


register_recipe("chatglm", _recipe)  # the model_type of GLM4VConfig


@when_imported("transformers")
def _register(_transformers):
    import_module("glm4v_nb.model")  # which may be the one that imports transformers
