"""Training the model: a step, batches for ``Trainer``, and how many operations a step takes."""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode

from glm4v_nb.model.configuration import GLM4VConfig
from glm4v_nb.model.splicing import IGNORED_LABEL, expand_image_positions
from simgpu.training import enable_gradient_checkpointing, first_update, trained_parameters

__all__ = [
    "ExpandingCollator",
    "answer_row",
    "enable_gradient_checkpointing",
    "first_update",
    "flop_counter",
    "train_step",
    "trained_parameters",
]


def train_step(model, prompt: dict[str, torch.Tensor], gradient_checkpointing: bool = False):
    """Forward and backward over the prompt, for what requires gradients; returns the loss."""
    model.train()
    if gradient_checkpointing:
        enable_gradient_checkpointing(model)
    loss = model(**prompt, labels=prompt["input_ids"], use_cache=False).loss
    loss.backward()
    return loss.detach()


def answer_row(processor, picture, question: str, answer: str) -> dict[str, torch.Tensor]:
    """One example for ``ExpandingCollator``: of a question about a picture only the answer counts.

    As in the model's own conversations, the answer begins with a line break and ends with the next
    user's turn.

    Returns:
        ``input_ids`` and ``labels`` (length), -100 in labels at the question; ``pixel_values``
        (3, side, side).
    """
    prompt, tokenizer = processor([picture], [question]), processor.tokenizer
    answered = tokenizer.encode(f"\n{answer}", add_special_tokens=False)
    answered = torch.tensor([*answered, tokenizer.convert_tokens_to_ids("<|user|>")])
    asked = prompt["input_ids"][0]
    return {
        "input_ids": torch.cat((asked, answered)),
        "labels": torch.cat((torch.full_like(asked, IGNORED_LABEL), answered)),
        "pixel_values": prompt["pixel_values"][0],
    }


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
