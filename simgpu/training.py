"""A training step: the weights it changes, forward, backward, the optimiser's first update."""

import warnings

import torch

from simgpu.workload import TRAINED

# Usual for adapters of models of some billion weights.
_LORA_RANK = 16
# What transformers' models call their parts that see.
_TOWERS = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_encoder")


def trained_parameters(model, trained: str = "everything") -> list[torch.nn.Parameter]:
    """Let a step change these weights and no others, and return them.

    "lora" adds adapters to the model for good, with the peft library.

    Raises:
        ValueError: not one of ``TRAINED``, or "decoder" of a model without an image tower.
        ImportError: "lora" without peft installed.
    """
    if trained not in TRAINED:
        raise ValueError(f"trained is {trained!r}; expected one of {', '.join(TRAINED)}.")
    for parameter in model.parameters():  # packed weights cannot be trained, what is on them can
        parameter.requires_grad_(parameter.is_floating_point())
    towers = [module for name, module in model.named_modules() if name.split(".")[-1] in _TOWERS]
    if trained == "decoder" and not towers:
        raise ValueError(
            f'trained is "decoder", but {type(model).__name__} has no image tower to leave as it'
            ' is. Use "everything" or "lora".'
        )
    for tower in towers:
        for parameter in tower.parameters():
            parameter.requires_grad_(trained == "everything" and parameter.is_floating_point())
    if trained == "lora":
        _add_adapters(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _add_adapters(model):
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        needs = "LoRA needs the peft library, which is not installed."
        raise ImportError(f"{needs} Run: pip install peft") from error
    if hasattr(model, "peft_config"):
        return
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = ["q_proj", "v_proj"] if {"q_proj", "v_proj"} <= names else "all-linear"
    with warnings.catch_warnings():
        # peft asks for a property that transformers 5.23 has renamed.
        message = ".*is_gradient_checkpointing"
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
        get_peft_model(model, LoraConfig(r=_LORA_RANK, target_modules=targets))
    # Or checkpointing would see no input with a gradient, and none would reach the adapters.
    model.enable_input_require_grads()


def enable_gradient_checkpointing(model):
    """Recompute activations in the backward pass; transformers 5.23 renamed the method for it."""
    renamed = getattr(model, "activation_checkpointing_enable", None)
    (renamed or model.gradient_checkpointing_enable)()


def first_update(parameters: list[torch.nn.Parameter], **options) -> torch.optim.Optimizer:
    """The first update of a new ``torch.optim.AdamW``, which makes its two numbers for every
    weight; ``options`` are its own, as ``foreach=False`` to update one weight after the other."""
    optimizer = torch.optim.AdamW(parameters, **options)
    optimizer.step()
    return optimizer
