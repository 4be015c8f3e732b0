"""A training step: the weights it changes, forward, backward, the optimiser's first update."""

import warnings
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode

from glm4v_nb.model.configuration import GLM4VConfig
from glm4v_nb.model.splicing import IGNORED_LABEL, expand_image_positions

TRAINED = ("everything", "decoder", "lora")
OPTIMIZERS = ("", "adamw")
# Usual for adapters of this size of model; rank 16 on two projections of 40 layers is 8.5 million
# weights.
_LORA = {"r": 16, "target_modules": ["q_proj", "v_proj"]}


def trained_parameters(model, trained: str = "everything") -> list[torch.nn.Parameter]:
    """Let a step change these weights and no others, and return them.

    "lora" adds adapters to the model for good, with the peft library.

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


@dataclass
class ExpandingCollator:
    """Makes batches for ``Trainer`` in which an image already has its positions, labels included.

    The model's logits count an image's 1602 positions, and ``Trainer`` compares them with the
    labels it was given: ``compute_metrics``, ``label_smoothing_factor`` and losses of one's own
    need labels of that length. ``Trainer(model, data_collator=ExpandingCollator(model.config))``.
    """

    config: GLM4VConfig

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """One batch of the processor's outputs, a row each, with labels of the prompt's length.

        Args:
            rows: ``input_ids`` (length), ``labels`` (length, by default the ids),
                ``attention_mask`` (length) and with an image ``pixel_values`` (3, side, side).

        Returns:
            ``input_ids``, ``attention_mask``, ``position_ids``, ``image_mask`` and ``labels``, each
            (batch, expanded length) and padded on the left; -100 in labels at images and padding.
            ``pixel_values`` (images, 3, side, side) if there are any.
        """

        def padded(name: str, filling: int, default):
            columns = [torch.as_tensor(row.get(name, default(row))) for row in rows]
            return pad_sequence(
                columns, batch_first=True, padding_value=filling, padding_side="left"
            )

        ids = padded("input_ids", self.config.pad_token_id, lambda row: row["input_ids"])
        mask = padded("attention_mask", 0, lambda row: torch.ones(len(row["input_ids"]), dtype=int))
        labels = padded("labels", IGNORED_LABEL, lambda row: row["input_ids"])
        images = [torch.as_tensor(row["pixel_values"]) for row in rows if "pixel_values" in row]
        prompt = expand_image_positions(self.config, ids, mask, None, labels, len(images))
        return vars(prompt) | ({"pixel_values": torch.stack(images)} if images else {})


def first_update(parameters: list[torch.nn.Parameter], **options) -> torch.optim.Optimizer:
    """The first update of a new ``torch.optim.AdamW``, which makes its two numbers for every
    weight; ``options`` are its own, as ``foreach=False`` to update one weight after the other."""
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
        for ending, formula in (("", forward), ("_backward", backward)):
            operator = f"_scaled_dot_product_{kind}_attention{ending}"
            formulas[getattr(torch.ops.aten, operator)] = formula
    return FlopCounterMode(display=False, custom_mapping=formulas)
