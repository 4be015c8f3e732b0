"""How a model of transformers is asked: which class it is, its inputs, prefill and decode.

``generate`` looks at the values of tokens and cannot run where tensors have none. A recipe takes
the same steps (one prefill over the whole prompt, then one position at a time) without looking. A
package with a model that asks otherwise registers its own with ``checkpoints.register_recipe``.
"""

import inspect
from collections.abc import Sequence
from functools import cached_property

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from simgpu import media
from simgpu.checkpoints import known_recipe
from simgpu.placement import input_device
from simgpu.training import enable_gradient_checkpointing, trained_parameters
from simgpu.workload import Workload

# Where the configuration names no class the first of these that has one for it is taken.
_ENCODER_DECODER = ("Seq2SeqLM", "SpeechSeq2Seq", "ImageTextToText")
_OTHERS = ("ImageTextToText", "MaskedLM", "CausalLM", "ImageClassification", "CTC")
# Where an output keeps what the next step needs, and that step takes it again.
_CACHES = ("past_key_values", "cache_params", "state")
# Ends no search for the longest prompt of a model without positions of its own.
MOST_TOKENS = 2**17


def read_recipe(config: PreTrainedConfig) -> "Recipe":
    """The recipe registered for a kind of model, or the general one.

    Raises:
        ValueError: a model that no class of transformers runs.
    """
    return (known_recipe(config.model_type) or Recipe)(config)


def model_class(config: PreTrainedConfig) -> type:
    """The class that runs a model: the one its configuration names, or an Auto class's choice."""
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if found is not None and getattr(found, "config_class", None) is type(config):
            return found
    is_pair = getattr(config, "is_encoder_decoder", False)
    for name in (*(_ENCODER_DECODER if is_pair else ()), *_OTHERS, ""):
        auto = getattr(transformers, f"AutoModelFor{name}" if name else "AutoModel")
        if type(config) in auto._model_mapping:
            found = auto._model_mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ValueError(
        f"No class of transformers {transformers.__version__} runs a {config.model_type!r}. Name"
        ' one in the config.json under "architectures", or run your own program: simgpu run.'
    )


class Recipe:
    """How models of transformers are asked that take text, and images or sound.

    Attributes:
        model_class: what is loaded; ``import_lines`` are the lines of Python that bring its name.
        context: most positions of prompt and answer together.
        generates: whether it makes new tokens, one after the other.
        decodings: how it can be told to make them; ``decoding`` is the way taken.
        decoding_bytes: after a run, what that way took beside the usual, by name; empty of the
            usual one, which is the first.
        most_samples: most at a time that this way takes; None where memory alone limits them.
    """

    decodings: tuple[str, ...] = ("eager",)
    decoding = "eager"
    most_samples: int | None = None

    def __init__(self, config: PreTrainedConfig):
        self.config, self.model_class = config, model_class(config)
        self.decoding_bytes: dict[str, int] = {}
        self._takes = set(inspect.signature(self.model_class.forward).parameters)
        self._text = config.get_text_config(decoder=True)
        self._main = getattr(self.model_class, "main_input_name", "input_ids")
        self.is_pair = bool(getattr(config, "is_encoder_decoder", False))
        limit = getattr(self._text, "max_position_embeddings", None)
        self.context = limit if isinstance(limit, int) and limit > 0 else MOST_TOKENS
        if not self.takes_text:
            self.context = 0

    @property
    def loader(self) -> str:
        """The name whose ``from_pretrained`` loads the model."""
        return self.model_class.__name__

    @property
    def import_lines(self) -> str:
        return f"from transformers import {self.loader}"

    def decode_by(self, decoding: str) -> "Recipe":
        """This recipe, with another way of decoding; ValueError for one that is not simulated."""
        if decoding not in self.decodings:
            raise ValueError(
                f"decoding is {decoding!r}; simulated of {self.loader} is"
                f" {' or '.join(map(repr, self.decodings))}. Take one of these."
            )
        self.decoding = decoding
        return self

    def answer_positions(self, new_tokens: int) -> int:
        """Positions of the context that an answer takes: its last token is never read."""
        return max(0, new_tokens - 1)

    def names_here(self, device_map):
        """A device map whose names may be those of another code for the same model."""
        return device_map

    def of_rank(self, rank: int, count: int) -> "Recipe":
        """How one of several processes that share the model asks its part of it.

        Raises:
            ValueError: so many cannot share it, or nobody has said here how it is split.
        """
        raise ValueError(
            f"parallel is 'tensor', but nothing here says how {self.loader} is split. Expected a"
            " model whose recipe does, as that of glm4v_nb. Leave parallel out, or run a program"
            " of your own: simgpu run."
        )

    def quantiser(self, weights: str, dtype: torch.dtype, keep: Sequence[str] | None = None):
        """``quantization_config`` for weights that are quantised while loading, all but ``keep``.

        Raises:
            ValueError: nobody has said how this model is.
        """
        raise ValueError(
            f"weights is {weights!r}, and the package of {self.loader} does not say how they are"
            " quantised. Leave weights out, or give from_pretrained a quantization_config in a"
            " program of your own: simgpu run."
        )

    def quantiser_lines(self, quantiser) -> tuple[str, str]:
        """Lines of Python that import what a ``quantiser`` is made of, and the one that makes it;
        what has no ``quantiser`` needs none."""
        raise NotImplementedError

    @property
    def takes_text(self) -> bool:
        return self._main == "input_ids"

    @property
    def takes_images(self) -> bool:
        return self.takes_text and "pixel_values" in self._takes

    @property
    def generates(self) -> bool:
        return self.model_class.can_generate() and self._main != "input_values"

    @cached_property
    def image_positions(self) -> int:
        """Positions of the prompt that one image takes."""
        if not self.takes_images:
            return 0
        return media.image_positions(self.config, self._takes, self.model_class)

    def workload(self, **sizes) -> Workload:
        """A workload of these sizes; those that are None or left out are what suits the model."""
        given = {name: size for name, size in sizes.items() if size is not None}
        train = given.get("train", False)
        usual = {
            "images": int(self.takes_images),
            "new_tokens": 128 if self.generates and not train else 0,
        }
        return Workload(**(usual | given))

    def check(self, workload: Workload):
        """Raises ValueError for what the model does not take, or beyond its context."""
        if workload.images and not self.takes_images:
            raise ValueError(
                f"images is {workload.images}, but {self.loader} takes no images beside text. Leave"
                " images out."
            )
        if workload.new_tokens > 1 and not self.generates:
            raise ValueError(
                f"new_tokens is {workload.new_tokens}, but {self.loader} generates no tokens. Leave"
                " new_tokens out."
            )
        if not self.takes_text:
            return
        image_positions = workload.images * self.image_positions
        positions = workload.text_tokens + image_positions
        if positions > self.context:
            image = f" ({image_positions} of them the image)" if workload.images else ""
            raise ValueError(
                f"The prompt takes {positions} positions{image}, but the model's context is"
                f" {self.context}. Lower text_tokens."
            )
        if workload.new_tokens > self.context:
            raise ValueError(
                f"new_tokens is {workload.new_tokens}, but the model's whole context is"
                f" {self.context}. Lower new_tokens."
            )

    def cache_bytes(self, workload: Workload, itemsize: int) -> int | None:
        """The KV cache when the last token is generated; None where it follows from no rule."""
        text = self._text
        heads = getattr(text, "num_attention_heads", None)
        kept = getattr(text, "num_key_value_heads", None) or heads
        layers, width = (getattr(text, name, None) for name in ("num_hidden_layers", "hidden_size"))
        if not all(isinstance(each, int) for each in (heads, kept, layers, width)):
            return None
        numbers = 2 * layers * kept * (getattr(text, "head_dim", None) or width // heads)
        positions = workload.images * self.image_positions
        positions += workload.text_tokens + workload.new_tokens
        return workload.batch_size * positions * numbers * itemsize

    def prompt(self, model, workload: Workload) -> dict[str, torch.Tensor]:
        """Random inputs of the workload's size on the model's device; all samples are the same."""
        generator = torch.Generator().manual_seed(0)
        inputs = {}
        if self.takes_text:
            ids = self._text_ids(workload, generator)
            inputs["input_ids"] = ids
            if workload.images:
                inputs |= self._with_images(ids, workload.images, generator)
        elif self._main == "pixel_values":
            inputs["pixel_values"] = torch.rand(
                1, *media.picture_size(self.config), generator=generator
            )
        else:
            inputs[self._main] = media.sound(self.config, self._main, generator)
        if self.is_pair and "decoder_input_ids" in self._takes and not workload.train:
            start = getattr(self.config, "decoder_start_token_id", None) or 0
            inputs["decoder_input_ids"] = torch.tensor([[start]])
        device, batch = input_device(model), workload.batch_size
        return {
            name: _of_batch(tensor, batch, device, model.dtype) for name, tensor in inputs.items()
        }

    def prefill(self, model, prompt: dict[str, torch.Tensor], new_tokens: int = 0):
        """Run the whole prompt once; with a KV cache, and the last position's scores, if it can.
        Some ways of decoding make room for the ``new_tokens`` that are to follow."""
        with torch.no_grad():
            return model(**prompt, **self._options())

    def decode(self, rig, model, prompt: dict[str, torch.Tensor], outputs, new_tokens: int):
        """Generate greedily from a prefill's ``outputs``, ``new_tokens`` tokens in all.

        The prefill has already given the first, so the model runs ``new_tokens - 1`` more times. On
        simulated cards ``rig.repeat`` runs two of them and replays the rest.
        """
        inputs = self._options()
        inputs |= {name: outputs[name] for name in _CACHES if outputs.get(name) is not None}
        has_cache = bool(inputs.keys() & set(_CACHES))
        if self.is_pair:
            hidden = outputs.encoder_last_hidden_state
            inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=hidden)
        name = "decoder_input_ids" if self.is_pair else "input_ids"
        token, ids = outputs.logits[:, -1:].argmax(dim=-1), prompt[name]
        del outputs

        def step():
            nonlocal token, ids
            ids = token if has_cache else torch.cat((ids, token), dim=1)
            token = model(**{name: ids}, **inputs).logits[:, -1:].argmax(dim=-1)

        with torch.no_grad():
            rig.repeat(step, new_tokens - 1)

    def trained_parameters(self, model, trained: str) -> list[torch.nn.Parameter]:
        """As ``training.trained_parameters``."""
        return trained_parameters(model, trained)

    def train_step(self, model, prompt: dict[str, torch.Tensor], gradient_checkpointing=False):
        """Forward and backward over the prompt, for what requires gradients; returns the loss.

        Raises:
            ValueError: the model computes no loss.
        """
        model.train()
        if gradient_checkpointing:
            enable_gradient_checkpointing(model)
        if "labels" not in self._takes:
            raise ValueError(
                f"{self.loader} computes no loss, so there is no training step of it. Name a class"
                ' that does under "architectures" in its config.json, or use simgpu run.'
            )
        labels = prompt.get("input_ids")
        if labels is None:
            first = prompt[self._main]
            size = (len(first), 32) if self.is_pair else (len(first),)
            labels = torch.zeros(size, dtype=torch.long, device=first.device)
        options = {"use_cache": False} if self._takes & {"use_cache"} else {}
        loss = model(**prompt, labels=labels, **options).loss
        loss.backward()
        return loss.detach()

    def _options(self) -> dict:
        takes_cache = self.generates and self._takes & {"use_cache", "kwargs"}
        options = {"use_cache": True} if takes_cache else {}
        return options | ({"logits_to_keep": 1} if "logits_to_keep" in self._takes else {})

    def _text_ids(self, workload: Workload, generator) -> torch.Tensor:
        size = getattr(self._text, "vocab_size", None) or 2
        special = {
            value
            for config in (self.config, self._text)
            for name, value in vars(config).items()
            if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
        }
        ordinary = torch.tensor([n for n in range(min(size, 1000)) if n not in special] or [0])
        places = torch.randint(len(ordinary), (1, workload.text_tokens), generator=generator)
        return ordinary[places]

    def _with_images(self, ids: torch.Tensor, count: int, generator) -> dict[str, torch.Tensor]:
        """The prompt with ``count`` images in front of its text."""
        token = media.image_token(self.config)
        inputs = media.image_inputs(self.config, self._takes, count, generator)
        ids = torch.cat((torch.full((1, count * self.image_positions), token), ids), dim=1)
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in self._takes:
                inputs[name] = (ids == token).long()
        return inputs | {"input_ids": ids}


def _of_batch(tensor: torch.Tensor, batch: int, device, dtype: torch.dtype) -> torch.Tensor:
    """An input of one sample for a whole batch; pictures and sound in the model's type."""
    size = (batch * len(tensor), *tensor.shape[1:])
    if tensor.is_floating_point():  # whose numbers do not matter, and which may be large
        return torch.empty(size, dtype=dtype, device=device)
    return tensor.repeat(batch, *[1] * (tensor.ndim - 1)).to(device)
