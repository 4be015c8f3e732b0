"""Where an image goes in a prompt: the three placeholder ids become the image's 1602 positions.

A prompt holds ``[boi, pad, eoi]``. Before the model runs, the pad is repeated until the three ids
take as many positions as the image has features. All patches share the *one* position number of the
placeholder, and the text after the image goes on from there, so decoding continues the unexpanded
numbering. This follows the original implementation of zai-org/glm-4v-9b; vLLM's port numbers the
patches 0..N, which is known to hurt accuracy (vllm-project/vllm#14790).
"""

from dataclasses import dataclass
from functools import partial

import torch
from transformers.generation.streamers import BaseStreamer
from wrapt import when_imported, wrap_function_wrapper

from glm4v_nb.model.configuration import GLM4VConfig

IGNORED_LABEL = -100


@dataclass
class ExpandedPrompt:
    """A prompt with room for its images; every tensor is (batch, expanded length)."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    image_mask: torch.Tensor  # True where an image feature replaces the token's embedding
    labels: torch.Tensor | None = None


def expand_image_positions(
    config: GLM4VConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    image_count: int = 0,
) -> ExpandedPrompt:
    """Make room for the images of a batch of prompts.

    Args:
        input_ids: (batch, length) token ids; a row holds no image or one ``[boi, pad, eoi]``.
        attention_mask: (batch, length), 0 for padding. None: nothing is padding.
        position_ids: (batch, length) of the *unexpanded* prompt. None: counted from the attention
            mask.
        labels: (batch, length) targets; image positions become -100, which the loss ignores.
        image_count: how many images come with the batch.

    Rows without an image in a batch that has some are padded on the left to the common length.

    Raises:
        ValueError: there are no ids, images and placeholders do not match, mask or labels are of
            another shape than the ids, or a prompt exceeds ``config.seq_length``.
    """
    if not input_ids.shape[-1]:
        raise ValueError(
            "input_ids has no ids. Expected a prompt of one at least. Build it with the processor's"
            " apply_chat_template."
        )
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    elif attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has the shape {tuple(attention_mask.shape)}, but input_ids"
            f" {tuple(input_ids.shape)}; they must be equal. In a later turn pass the whole"
            " conversation again: what the cache holds is not computed twice."
        )
    if labels is not None and labels.shape != input_ids.shape:
        raise ValueError(
            f"labels has the shape {tuple(labels.shape)}, but input_ids {tuple(input_ids.shape)};"
            " they must be equal. Give one label for each id, -100 where there is none."
        )
    if position_ids is None:
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    position_ids = position_ids.expand(len(input_ids), -1)
    starts = [_image_start(config, row, ids) for row, ids in enumerate(input_ids.tolist())]
    _check_image_count(sum(start is not None for start in starts), image_count)
    _check_length(config, attention_mask, starts)
    if not image_count:
        no_image = torch.zeros_like(input_ids, dtype=torch.bool)
        return ExpandedPrompt(input_ids, attention_mask, position_ids, no_image, labels)

    sources = _sources(starts, input_ids.shape[1], config.vision_config.image_tokens)
    source, image_mask = (each.to(input_ids.device) for each in sources)

    def spread(tensor, padding_value):
        return tensor.gather(1, source.clamp(min=0)).masked_fill(source < 0, padding_value)

    if labels is not None:
        labels = spread(labels, IGNORED_LABEL).masked_fill(image_mask, IGNORED_LABEL)
    return ExpandedPrompt(
        input_ids=spread(input_ids, config.pad_token_id),
        attention_mask=spread(attention_mask, 0),
        position_ids=spread(position_ids, 0),
        image_mask=image_mask,
        labels=labels,
    )


def merge_image_features(
    embeddings: torch.Tensor, features: torch.Tensor, image_mask: torch.Tensor
) -> torch.Tensor:
    """Replace embeddings (batch, length, hidden) by features (images, image_tokens, hidden).

    ``image_mask``, (batch, length), is True on exactly ``image_tokens`` positions of the rows that
    have an image; features come in the order of these rows.
    """
    image_index = (image_mask.any(dim=1).cumsum(0) - 1).clamp(min=0)
    feature_index = (image_mask.cumsum(dim=1) - 1).clamp(min=0)
    placed = features[image_index[:, None], feature_index]
    return torch.where(image_mask[..., None], placed, embeddings)


def expand_batches_of_trainer():
    """Let transformers' ``Trainer`` give this model batches with room for their images.

    The logits count all positions of an image, and ``Trainer`` compares them with the labels of the
    batch: in ``compute_metrics``, label smoothing and losses of one's own, which are all of one
    length so.
    """

    def prepare(wrapped, trainer, args, kwargs):
        inputs, config = wrapped(*args, **kwargs), getattr(trainer.model, "config", None)
        if isinstance(config, GLM4VConfig) and inputs.get("pixel_values") is not None:
            if {"input_ids", "image_mask"} & inputs.keys() == {"input_ids"}:
                given = ("input_ids", "attention_mask", "position_ids", "labels")
                images = len(inputs["pixel_values"])
                prompt = expand_image_positions(config, *map(inputs.get, given), images)
                inputs |= {name: one for name, one in vars(prompt).items() if one is not None}
        return inputs

    wrap = partial(wrap_function_wrapper, name="Trainer._prepare_inputs", wrapper=prepare)
    when_imported("transformers.trainer")(wrap)


def _sources(starts: list[int | None], length: int, image_tokens: int):
    """For each expanded position the unexpanded one it is a copy of, -1 for new padding on the
    left; and whether it is of an image."""
    extra = image_tokens - 3
    source = torch.empty(len(starts), length + extra, dtype=torch.long)
    image_mask = torch.zeros(len(starts), length + extra, dtype=torch.bool)
    for row, start in enumerate(starts):
        copied, at = (-1, 0) if start is None else (start + 1, start + 2)
        source[row] = torch.tensor([*range(at), *[copied] * extra, *range(at, length)])
        if start is not None:
            image_mask[row, start : start + image_tokens] = True
    return source, image_mask


def _image_start(config: GLM4VConfig, row: int, ids: list[int]) -> int | None:
    """Index of begin-of-image in one prompt, None without an image."""
    count = ids.count(config.boi_token_id)
    if count == 0 and config.eoi_token_id not in ids:
        return None
    if count > 1:
        raise ValueError(
            f"Prompt {row} holds {count} image placeholders; GLM-4V-9B takes one image per prompt."
            " Ask about one image at a time, or paste the images into one picture."
        )
    start = ids.index(config.boi_token_id) if count else len(ids)
    if ids[start + 2 : start + 3] != [config.eoi_token_id]:
        raise ValueError(
            f"Prompt {row}: begin-of-image ({config.boi_token_id}) and end-of-image"
            f" ({config.eoi_token_id}) must stand around exactly one placeholder id. Build prompts"
            " with the processor's apply_chat_template."
        )
    return start


def _check_image_count(placeholders: int, images: int):
    if placeholders and not images:
        raise ValueError(
            f"{placeholders} prompt(s) hold an image placeholder, but no pixel_values were given."
            " Pass the images: build both with AutoProcessor's apply_chat_template (the tokenizer"
            " alone leaves the pixels out); or build the prompt without one."
        )
    if placeholders != images:
        raise ValueError(
            f"{images} image(s) were given for {placeholders} image placeholder(s) in the prompts;"
            " the numbers must be equal. Build ids and pixel_values together with the processor's"
            " apply_chat_template."
        )


def _check_length(config: GLM4VConfig, attention_mask: torch.Tensor, starts: list[int | None]):
    image_tokens = config.vision_config.image_tokens
    for row, (tokens, start) in enumerate(zip(attention_mask.sum(1).tolist(), starts, strict=True)):
        positions = tokens + (0 if start is None else image_tokens - 3)
        if positions > config.seq_length:
            image = "" if start is None else f" ({image_tokens} of them the image)"
            raise ValueError(
                f"Prompt {row} takes {positions} positions{image}, but the model's context is"
                f" {config.seq_length} (seq_length). Shorten the text."
            )


def check_embeddings(input_ids, pixel_values):
    """ValueError for an image without the prompt that says where it goes."""
    if input_ids is None and pixel_values is not None:
        raise ValueError(
            "There are pixel_values but no input_ids, whose placeholder says where the image goes."
            " Expected both, as the processor's apply_chat_template makes them. Leave inputs_embeds"
            " out where there is an image."
        )


class UnexpandedPrompt(BaseStreamer):
    """Hands a streamer the prompt as the caller gave it, instead of 1602 placeholder ids."""

    def __init__(self, streamer: BaseStreamer, input_ids: torch.Tensor):
        self.streamer, self.prompt = streamer, iter([input_ids])

    def put(self, value):
        self.streamer.put(next(self.prompt, value))

    def end(self):
        self.streamer.end()
