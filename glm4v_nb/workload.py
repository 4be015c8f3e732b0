"""The two halves of inference on prompts of a given size; the same on real and simulated cards.

``generate`` looks at the values of tokens and cannot run where tensors have none. These functions
take the same steps (one prefill over the whole prompt, then one position at a time) without
looking.
"""

from dataclasses import dataclass

import torch

from glm4v_nb.model.configuration import GLM4VConfig
from glm4v_nb.model.splicing import expand_image_positions
from glm4v_nb.placement import input_device
from glm4v_nb.training import OPTIMIZERS, TRAINED

# Beyond any card: of so many samples the logits of one position alone take 300 GB.
MOST_SAMPLES = 2**20


@dataclass(frozen=True)
class Workload:
    """Sizes of a run; ValueError for one that cannot be run.

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
        smallest = {"batch_size": 1, "text_tokens": 1, "new_tokens": 0, "images": 0}
        for name, least in smallest.items():
            size, expected = getattr(self, name), f"expected a whole number of at least {least}."
            if not isinstance(size, int) or isinstance(size, bool) or size < least:
                raise ValueError(f"{name} is {size!r}; {expected}")
        if self.batch_size > MOST_SAMPLES:
            raise ValueError(
                f"batch_size is {self.batch_size}; expected at most {MOST_SAMPLES}, which is more"
                " than any card holds. Lower it; fit --limits finds the largest that fits."
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
            choice = getattr(self, name)
            if choice not in expected:
                choices = ", ".join(map(repr, expected))
                raise ValueError(f"{name} is {choice!r}; expected one of {choices}.")
            if choice != expected[0] and not self.train:
                advice = "Set train as well, or leave it out."
                raise ValueError(f"{name} is {choice!r}, which is for training. {advice}")


def check_context(workload: Workload, config: GLM4VConfig):
    """Raises ValueError where the prompt, or the answer alone, exceeds the model's context."""
    image_positions = workload.images * config.vision_config.image_tokens
    positions = workload.text_tokens + image_positions
    if positions > config.seq_length:
        image = f" ({image_positions} of them the image)" if workload.images else ""
        raise ValueError(
            f"The prompt takes {positions} positions{image}, but the model's context is"
            f" {config.seq_length}. Lower text_tokens."
        )
    if workload.new_tokens > config.seq_length:
        raise ValueError(
            f"new_tokens is {workload.new_tokens}, but the model's whole context is"
            f" {config.seq_length}. Lower new_tokens."
        )


def make_prompt(model, workload: Workload) -> dict[str, torch.Tensor]:
    """Random inputs of the workload's size on the model's device; all samples are the same.

    Returns:
        ``input_ids``, ``position_ids`` and ``image_mask``, each (batch, positions), and with images
        ``pixel_values`` (batch, 3, side, side) in float32, as the processor makes them.

    Raises:
        ValueError: the prompt is longer than the model's context.
    """
    config = model.config
    generator = torch.Generator().manual_seed(0)
    # Ordinary text only: special ids, the image's among them, stand at the end of the vocabulary.
    ordinary = min(config.boi_token_id, config.pad_token_id)
    text = torch.randint(ordinary, (1, workload.text_tokens), generator=generator)
    placeholder = [config.boi_token_id, config.pad_token_id, config.eoi_token_id] * workload.images
    ids = torch.cat((torch.tensor([placeholder], dtype=torch.long), text), dim=1)
    prompt = vars(expand_image_positions(config, ids, image_count=workload.images))
    inputs = {name: prompt[name] for name in ("input_ids", "position_ids", "image_mask")}
    if workload.images:
        side = config.vision_config.image_size
        inputs["pixel_values"] = torch.rand(1, 3, side, side, generator=generator)
    # Not model.device: that is "meta" where the first module of the model is offloaded.
    device = input_device(model)
    # One sample for the whole batch, copied on the device: no byte of it depends on the values, and
    # a simulated batch may be larger than this machine.
    return {
        name: tensor.expand(workload.batch_size, *tensor.shape[1:]).to(device)
        for name, tensor in inputs.items()
    }


@torch.no_grad()
def prefill(model, prompt: dict[str, torch.Tensor]):
    """Run the whole prompt once: an output with the last position's logits and the KV cache."""
    return model(**prompt, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def decode(rig, model, prompt: dict[str, torch.Tensor], outputs, new_tokens: int):
    """Generate greedily from a prefill's ``outputs``, ``new_tokens`` tokens in all.

    The prefill has already given the first, so the model runs ``new_tokens - 1`` more times. On
    simulated cards ``rig.repeat`` runs two of them and replays the rest.
    """
    inputs = {"past_key_values": outputs.past_key_values, "use_cache": True, "logits_to_keep": 1}
    token = outputs.logits[:, -1:].argmax(dim=-1)
    position = prompt["position_ids"][:, -1:]

    def step():
        nonlocal token, position
        position = position + 1
        logits = model(input_ids=token, position_ids=position, **inputs).logits
        token = logits.argmax(dim=-1)

    rig.repeat(step, new_tokens - 1)
