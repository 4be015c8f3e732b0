"""The two halves of inference on prompts of a given size; the same on real and simulated cards.

``generate`` looks at the values of tokens and cannot run where tensors have none. These functions
take the same steps (one prefill over the whole prompt, then one position at a time) without
looking.
"""

from dataclasses import dataclass

import torch

from glm4v_nb.model.splicing import expand_image_positions
from glm4v_nb.placement import input_device
from glm4v_nb.training import OPTIMIZERS, TRAINED


@dataclass(frozen=True)
class Workload:
    """Sizes of a run.

    ``text_tokens`` counts prompt tokens per sample without the image's positions (1602 at full
    size); ``images`` is per sample, 0 or 1, which is what the model takes. With ``train`` it is one
    training step: ``trained`` names the weights it changes ("everything", "decoder" for all but the
    image tower, "lora" for small matrices added to the decoder's attention), ``optimizer`` the one
    whose first update follows the backward pass ("" for none, "adamw").
    """

    batch_size: int = 1
    images: int = 1
    text_tokens: int = 32
    new_tokens: int = 128
    train: bool = False
    gradient_checkpointing: bool = False
    trained: str = "everything"
    optimizer: str = ""

    def __post_init__(self):
        for name, least in (
            ("batch_size", 1),
            ("text_tokens", 1),
            ("new_tokens", 0),
            ("images", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(
                    f"{name} is {value!r}; expected a whole number of at least {least}."
                )
        if self.images > 1:
            raise ValueError(
                f"images is {self.images}; GLM-4V-9B takes at most one image per sample. For"
                " several images use a larger batch_size."
            )
        if self.gradient_checkpointing and not self.train:
            raise ValueError(
                "gradient_checkpointing saves memory of the backward pass and does nothing in"
                " inference. Set train as well, or leave it out."
            )
        for name, expected in (("trained", TRAINED), ("optimizer", OPTIMIZERS)):
            value = getattr(self, name)
            if value not in expected:
                raise ValueError(
                    f"{name} is {value!r}; expected one of {', '.join(map(repr, expected))}."
                )
            if value != expected[0] and not self.train:
                raise ValueError(
                    f"{name} is {value!r}, which is for training. Set train as well, or leave it"
                    " out."
                )


def make_prompt(model, workload: Workload) -> dict[str, torch.Tensor]:
    """Random inputs of the workload's size on the model's device; all samples have the same image.

    Returns:
        ``input_ids``, ``position_ids`` and ``image_mask``, each (batch, positions), and with images
        ``pixel_values`` (batch, 3, side, side) in float32, as the processor makes them.

    Raises:
        ValueError: the prompt is longer than the model's context.
    """
    config = model.config
    generator = torch.Generator().manual_seed(0)
    # Ordinary text only: special ids, the image's among them, stand at the end of the vocabulary.
    text = torch.randint(
        min(config.boi_token_id, config.pad_token_id),
        (workload.batch_size, workload.text_tokens),
        generator=generator,
    )
    image = torch.tensor(
        [config.boi_token_id, config.pad_token_id, config.eoi_token_id] * workload.images
    )
    input_ids = torch.cat((image.long().expand(workload.batch_size, -1), text), dim=1)
    prompt = expand_image_positions(
        config, input_ids, image_count=workload.batch_size * workload.images
    )
    side = config.vision_config.image_size
    inputs = {
        "input_ids": prompt.input_ids,
        "position_ids": prompt.position_ids,
        "image_mask": prompt.image_mask,
    }
    if workload.images:
        # One image for the whole batch: drawing a new one for each takes seconds, and no byte
        # depends on it.
        pixels = torch.rand(1, 3, side, side, generator=generator)
        inputs["pixel_values"] = pixels.expand(workload.batch_size, -1, -1, -1)
    # Not model.device: that is "meta" where the first module of the model is offloaded.
    device = input_device(model)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


@torch.no_grad()
def prefill(model, prompt: dict[str, torch.Tensor]):
    """Run the whole prompt once; returns the model's output with logits of the last position and
    the KV cache."""
    return model(**prompt, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def decode(rig, model, prompt: dict[str, torch.Tensor], outputs, new_tokens: int):
    """Generate greedily from a prefill's ``outputs``, ``new_tokens`` tokens in all.

    The prefill has already given the first, so the model runs ``new_tokens - 1`` more times. On
    simulated cards ``rig.repeat`` runs two of them and replays the rest.
    """
    cache = outputs.past_key_values
    token = outputs.logits[:, -1:].argmax(dim=-1)
    position = prompt["position_ids"][:, -1:]

    def step():
        nonlocal token, position
        position = position + 1
        logits = model(
            input_ids=token,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        token = logits.argmax(dim=-1)

    rig.repeat(step, new_tokens - 1)
