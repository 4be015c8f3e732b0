"""The two halves of inference on prompts of a given size; the same on real and simulated cards.

These functions take the steps of ``generate`` (one prefill over the whole prompt, then one position
at a time) without looking at the values of tokens, which simulated cards do not have.
"""

from dataclasses import dataclass

import torch
from transformers import StaticCache

from glm4v_nb.inference.fast import MOST_ROWS, FastDecoder
from glm4v_nb.inference.supported import why_not
from glm4v_nb.model.configuration import GLM4VConfig
from glm4v_nb.model.official_names import keys_here
from glm4v_nb.model.quantising import KEEP, lines_of, quantiser_for
from glm4v_nb.model.splicing import expand_image_positions
from glm4v_nb.parallel import Ranks, check_count
from glm4v_nb.parallel.modeling import rank_class
from simgpu.placement import input_device
from simgpu.recipes import Recipe
from simgpu.workload import Workload as AnyWorkload


@dataclass(frozen=True)
class Workload(AnyWorkload):
    """As ``simgpu.workload.Workload``, by default an image and an answer of 128 tokens.

    An image takes 1602 positions at full size; a sample has 0 or 1, which is what the model takes.
    """

    images: int = 1
    new_tokens: int = 128

    def __post_init__(self):
        super().__post_init__()
        if self.images > 1:
            raise ValueError(
                f"images is {self.images}; GLM-4V-9B takes at most one image per sample. For"
                " several images use a larger batch_size."
            )


class GLM4VRecipe(Recipe):
    """How ``fit`` asks this model: as ``make_prompt``, ``prefill`` and ``decode`` do, or, with
    another way of decoding, as ``generate`` does."""

    decodings = ("eager", "static", "fast", "lookup")
    loader = "AutoModelForCausalLM"
    import_lines = (
        "from transformers import AutoModelForCausalLM\n\n"
        "import glm4v_nb  # teaches transformers the model"
    )

    def __init__(self, config: GLM4VConfig):
        super().__init__(config)
        self.context = config.seq_length

    @property
    def is_fast(self) -> bool:
        return self.decoding in ("fast", "lookup")

    @property
    def most_samples(self) -> int | None:
        return MOST_ROWS if self.is_fast else None

    def decode_by(self, decoding: str):
        """As of ``Recipe``."""
        if decoding == "compiled":
            raise ValueError(
                "decoding is 'compiled', which is not simulated: what torch.compile and its graphs"
                " keep follows from no rule that is known here. Take 'static' for its cache alone,"
                " or measure on a real card."
            )
        return super().decode_by(decoding)

    def check(self, workload):
        """As of ``Recipe``; also refuses what this way of decoding does not take."""
        super().check(workload)
        if workload.train and self.decoding != "eager":
            raise ValueError(
                f"decoding is {self.decoding!r}, but a training step decodes nothing. Leave"
                " decoding out, or train."
            )
        if self.is_fast and workload.batch_size > MOST_ROWS:
            raise ValueError(
                f"batch_size is {workload.batch_size}; {self.decoding} decoding takes at most"
                f" {MOST_ROWS} samples at a time. Lower it, or take eager decoding."
            )

    def answer_positions(self, new_tokens: int) -> int:
        """Fast decoding makes room for the last token, too."""
        return new_tokens if self.is_fast else super().answer_positions(new_tokens)

    def names_here(self, device_map):
        """A device map with official names, as for the original code, under the names here."""
        return keys_here(device_map, parts=False)

    def quantiser(self, weights: str, dtype: torch.dtype, keep=None):
        if self.is_fast and weights == "nf4":
            raise ValueError(
                f"decoding is {self.decoding!r} and weights 'nf4', which its kernels do not read:"
                " generate would take the rung below, whose memory is not simulated. Take eager or"
                " static decoding, or weights of int8 or int4."
            )
        return quantiser_for(weights, self.config, dtype, KEEP if keep is None else keep)

    def quantiser_lines(self, quantiser) -> tuple[str, str]:
        return lines_of(quantiser)

    def of_rank(self, rank: int, count: int) -> "GLM4VRecipe":
        check_count(self.config, count)
        part = GLM4VRecipe(self.config).decode_by(self.decoding)
        part.model_class = rank_class(Ranks(rank, count, exchanges=False))
        return part

    @property
    def image_positions(self) -> int:
        return self.config.vision_config.image_tokens

    def workload(self, **sizes) -> Workload:
        return Workload(**{name: size for name, size in sizes.items() if size is not None})

    def prompt(self, model, workload: Workload) -> dict[str, torch.Tensor]:
        return make_prompt(model, workload)

    def prefill(self, model, prompt, new_tokens: int = 0):
        """As of ``Recipe``; ValueError where cards or model cannot decode so."""
        self.decoding_bytes = {}
        if self.decoding == "eager":
            return prefill(model, prompt)
        batch, positions = prompt["input_ids"].shape
        length = positions + new_tokens
        if not self.is_fast:
            text = model.config.get_text_config(decoder=True)
            cache = StaticCache(config=text, max_cache_len=max(positions, length - 1))
            outputs = prefill(model, prompt, past_key_values=cache)
            found = [each for layer in cache.layers for each in (layer.keys, layer.values)]
            self.decoding_bytes = {"static cache": sum(each.nbytes for each in found)}
            return outputs
        if reason := why_not(model):
            raise ValueError(
                f"decoding is {self.decoding!r}, but {reason}. There generate takes the rung"
                " below, whose memory is not simulated. Take eager or static decoding."
            )
        decoder = FastDecoder(self.decoding == "lookup")
        cache = decoder.prepare(model, batch, length)
        self.decoding_bytes = decoder.memory()
        outputs = decoder.prefill(model, cache, **prompt)
        outputs.decoder = decoder
        return outputs

    def decode(self, rig, model, prompt, outputs, new_tokens: int):
        """As of ``Recipe``."""
        if not self.is_fast:
            decode(rig, model, prompt, outputs, new_tokens)
        else:
            outputs.decoder.rehearse(
                outputs.logits[:, -1], prompt["input_ids"].shape[1], new_tokens
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
def prefill(model, prompt: dict[str, torch.Tensor], **options):
    """Run the whole prompt once: an output with the last position's logits and the KV cache.

    ``options`` are others of the model, as ``past_key_values``.
    """
    return model(**prompt, use_cache=True, logits_to_keep=1, **options)


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
