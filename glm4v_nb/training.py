"""A training step: the weights it changes, forward, backward, the optimiser's first update."""

import warnings

import torch
from torch.utils.flop_counter import FlopCounterMode

TRAINED = ("everything", "decoder", "lora")
OPTIMIZERS = ("", "adamw")
# Usual for adapters of this size of model; rank 16 on two projections of 40 layers is 8.5 million
# weights.
_LORA = {"r": 16, "target_modules": ["q_proj", "v_proj"]}


def trained_parameters(model, trained: str = "everything") -> list[torch.nn.Parameter]:
    """Let a step change these weights and no others, and return them.

    "lora" adds adapters to the model for good, with the peft library; the model is otherwise as it
    was.

    Raises:
        ValueError: not one of ``TRAINED``.
        ImportError: "lora" without peft installed.
    """
    if trained not in TRAINED:
        raise ValueError(f"trained is {trained!r}; expected one of {', '.join(TRAINED)}.")
    model.requires_grad_(True)
    model.vision_tower.requires_grad_(trained == "everything")
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
    with warnings.catch_warnings():
        # peft asks for a property that transformers 5.23 has renamed.
        message = ".*is_gradient_checkpointing"
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
        get_peft_model(model, LoraConfig(**_LORA))
    # Or checkpointing would see no input with a gradient, and none would reach the adapters.
    model.enable_input_require_grads()


def enable_gradient_checkpointing(model):
    """Recompute activations in the backward pass; transformers 5.23 renamed the method for it."""
    renamed = getattr(model, "activation_checkpointing_enable", None)
    (renamed or model.gradient_checkpointing_enable)()


def train_step(model, prompt: dict[str, torch.Tensor], gradient_checkpointing: bool = False):
    """Forward and backward over the prompt, for what requires gradients; returns the loss."""
    model.train()
    if gradient_checkpointing:
        enable_gradient_checkpointing(model)
    loss = model(**prompt, labels=prompt["input_ids"], use_cache=False).loss
    loss.backward()
    return loss.detach()


def first_update(parameters: list[torch.nn.Parameter], **options) -> torch.optim.Optimizer:
    """The first update of a new AdamW, which makes its two numbers for every weight.

    ``options`` are those of ``torch.optim.AdamW``, as ``foreach=False`` to update one weight after
    the other.
    """
    optimizer = torch.optim.AdamW(parameters, **options)
    optimizer.step()
    return optimizer


def flop_counter() -> FlopCounterMode:
    """Counts the operations in its block, from shapes; ``get_total_flops()`` has the sum.

    torch's own counter, with formulas for attention whose keys have fewer heads than its queries;
    torch 2.11 has none.
    """

    def forward(query, key, value, *others, **options):
        batch, heads, positions, features = query
        return 2 * batch * heads * positions * key[2] * (features + value[3])

    def backward(gradient, query, key, value, *others, **options):
        # Scores once more, and gradients of values, scores, queries and keys.
        batch, heads, positions, features = query
        return 2 * batch * heads * positions * key[2] * (3 * features + 2 * value[3])

    formulas = {}
    for kind in ("cudnn", "flash", "efficient"):
        operator = f"_scaled_dot_product_{kind}_attention"
        formulas[getattr(torch.ops.aten, operator)] = forward
        formulas[getattr(torch.ops.aten, f"{operator}_backward")] = backward
    return FlopCounterMode(display=False, custom_mapping=formulas)
