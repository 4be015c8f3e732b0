"""GLM-4V-9B: the image tower in front of transformers' own ``GlmModel`` decoder.

Modules are registered in the order data flows (tower, decoder, head), so an automatic device map
puts the tower on the first GPU, where the images arrive. The official implementation registers it
last.
"""

from contextvars import ContextVar
from functools import partial

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, GlmModel, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.glm.modeling_glm import GlmAttention, GlmDecoderLayer
from transformers.utils import can_return_tuple

from glm4v_nb.model.chat import refuse_pictures
from glm4v_nb.model.checkpoint import load_checked
from glm4v_nb.model.configuration import GLM4VConfig
from glm4v_nb.model.official_names import state_dict_here, unshare_storage
from glm4v_nb.model.quantising import (
    check_autocast,
    check_conversion,
    parts_of,
    prepare_saving,
    unpack,
)
from glm4v_nb.model.splicing import (
    ExpandedPrompt,
    UnexpandedPrompt,
    check_embeddings,
    expand_image_positions,
    merge_image_features,
)
from glm4v_nb.model.vision import GLM4VVisionTower

_LOADING = ContextVar("loading", default=False)


class GLM4VForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Answers questions about one image per prompt; loads and saves the official checkpoint layout.

    Prompts are as the processor makes them (three placeholder ids per image), or expanded by
    ``expand_image_positions``, with an ``image_mask`` that says where the image features go.
    """

    config_class = GLM4VConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    # Blocks whose parts must share a device: each holds a residual connection or parameters it uses
    # directly.
    _no_split_modules = [
        "GLM4VPatchEmbedding",
        "GLM4VVisionLayer",
        "GLM4VProjector",
        "GLM4VImageBoundary",
        "GlmDecoderLayer",
    ]
    _skip_keys_device_placement = ["past_key_values"]
    # A buffer that official checkpoints carry and every loader recomputes.
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": GlmDecoderLayer, "attentions": GlmAttention}

    def __init__(self, config: GLM4VConfig):
        for name, value in config.decoder_fields().items():  # a field may have been assigned to
            setattr(config.text_config, name, value)
        super().__init__(config)
        self.vision_tower = GLM4VVisionTower(config)
        self.language_model = GlmModel(config.text_config)
        self.lm_head = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As transformers' own, but refuses damaged or incomplete checkpoints and pickles."""
        loader, loading = super().from_pretrained, _LOADING.set(True)
        try:
            return load_checked(cls, loader, pretrained_model_name_or_path, *model_args, **kwargs)
        finally:
            _LOADING.reset(loading)

    def save_pretrained(self, *args, **kwargs):
        """As transformers' own, in the official layout; quantised weights, whose projections cannot
        be fused again, under the names of the modules here. ValueError, before anything is written,
        for those that would not load again."""
        prepare_saving(self, kwargs)
        return super().save_pretrained(*args, **kwargs)

    def train(self, mode: bool = True):
        """As torch's own; 4 bits that an answer has turned are turned back (``unpack``)."""
        if mode:
            unpack(self)
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        check_conversion(self, fn)  # behind to(), half(), cuda() and the like
        return super()._apply(fn, recurse)

    def state_dict(self, *args, **kwargs):
        """As torch's own, of weights as they were loaded (``unpack``)."""
        unpack(self)
        return super().state_dict(*args, **kwargs)

    def dequantize(self, dtype: torch.dtype | None = None):
        """As transformers' own, of weights as they were loaded (``unpack``)."""
        unpack(self)
        # Its default is the configuration's, which is a word once the model was saved.
        return super().dequantize(dtype or self.dtype)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Read official names too, as when ``Trainer`` resumes; torch comes here from wrappers such
        as DataParallel as well, with what stands before the names.

        Raises:
            ValueError: none of the names is one of the model's.
        """
        given = {name: state_dict[name] for name in list(state_dict) if name.startswith(prefix)}
        given = {name.removeprefix(prefix): tensor for name, tensor in given.items()}
        here = state_dict_here(given, self.config)
        if here and here.keys().isdisjoint(self.state_dict()):
            raise ValueError(
                f"None of the {len(here)} tensors is one of this model's; the first is"
                f" {next(iter(given))!r}. Expected the official names of GLM-4V-9B or those of"
                " model.state_dict(). Is it the state dict of another model, or of a wrapper (then"
                " remove its prefix)?"
            )
        for name in given.keys() - here.keys():
            del state_dict[prefix + name]
        state_dict.update({prefix + name: here[name] for name in here.keys() - given.keys()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _save_to_state_dict(self, *args):
        # The loader leaves queries, keys and values as parts of one storage. Libraries that write
        # safetensors take that for one tensor under three names: accelerate drops two of them.
        # While the model is loaded nothing is saved, and accelerate asks for names alone.
        for layer in self.language_model.layers if not _LOADING.get() else ():
            unshare_storage(layer.self_attn)
        super()._save_to_state_dict(*args)

    def get_memory_footprint(self, return_buffers=True):
        """As transformers' own, in bytes; of quantised weights what they hold, and not what tensors
        of their data type would."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(part.nbytes for tensor in tensors for part in parts_of(tensor))

    def load_adapter(self, *args, **kwargs):
        """As transformers' own; ValueError where weights of the adapter find no values."""
        info = super().load_adapter(*args, **kwargs)
        if lost := sorted(getattr(info, "missing_keys", ())):
            raise ValueError(
                f"The adapter has no values for {len(lost)} of its weights here, first {lost[0]!r}:"
                " it was saved under other names. Load the model anew, then"
                " peft.PeftModel.from_pretrained(model, adapter), which takes official names too."
            )
        return info

    def resize_token_embeddings(self, *args, **kwargs):
        """As transformers' own; the configuration counts the new rows too, and is saved so.

        Raises:
            ValueError: ids of the configuration would have no row left.
        """
        rows = args[0] if args else kwargs.get("new_num_tokens")
        needed = max(self.config.boi_token_id, self.config.eoi_token_id, self.config.pad_token_id)
        if rows is not None and rows <= needed:
            raise ValueError(
                f"{rows} token embeddings would leave none for id {needed}, which every image or"
                f" padding needs. Give more than {needed}."
            )
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.config.padded_vocab_size = embeddings.num_embeddings
        return embeddings

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (images, 3, side, side) to decoder embeddings (images, image_tokens, hidden)."""
        self._count_images(pixel_values)
        return self.vision_tower(pixel_values.to(self.vision_tower.conv.weight.dtype))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_mask: torch.BoolTensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, positions, vocabulary), where an image counts as its 1602 positions.

        Args:
            input_ids: (batch, length), or embeddings of them as ``inputs_embeds``.
            pixel_values: (images, 3, side, side), in the order of the prompts that have an image.
            attention_mask: (batch, length), or (batch, cached + length) with a cache.
            position_ids: (batch, length); numbering of the unexpanded prompt. Without them a step
                after an image goes on from what the prompt that filled the cache ended with.
            labels: (batch, length); image positions are ignored by the loss.
            logits_to_keep: logits of only the last so many positions (0: all).
            image_mask: (batch, length); given when the prompt is already expanded.
        """
        refuse_pictures(kwargs, "Give pixel_values, as the processor makes them.")
        if (input_ids is None) == (inputs_embeds is None):
            found = "neither input_ids nor" if input_ids is None else "both input_ids and"
            raise ValueError(
                f"There are {found} inputs_embeds. Expected one of them: a prompt, with an image's"
                " placeholder where pixel_values are given. Build it with the processor's"
                " apply_chat_template."
            )
        check_autocast(self)
        prompt = None
        if image_mask is None:
            check_embeddings(input_ids, pixel_values)
            others = attention_mask, position_ids, labels
            prompt = self._expanded(input_ids, pixel_values, past_key_values, *others)
        if prompt is not None:
            input_ids, labels, image_mask = prompt.input_ids, prompt.labels, prompt.image_mask
            attention_mask, position_ids = prompt.attention_mask, prompt.position_ids
        behind = getattr(past_key_values, "positions_behind", None)
        length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        if behind is not None and attention_mask is not None and prompt is None:
            self._check_mask(attention_mask, past_key_values, length)
        if position_ids is None and behind is not None:
            # A decoding loop by hand: go on from the numbering of the unexpanded prompt.
            steps = past_key_values.get_seq_length() + torch.arange(length, device=behind.device)
            position_ids = steps - behind
        if inputs_embeds is None:
            inputs_embeds = self.language_model.embed_tokens(input_ids)
        if pixel_values is not None:
            device, dtype = inputs_embeds.device, inputs_embeds.dtype
            features = self.get_image_features(pixel_values).to(device, dtype)
            inputs_embeds = merge_image_features(inputs_embeds, features, image_mask.to(device))
        if image_mask is not None and attention_mask is None and past_key_values is None:
            # Without a mask or a cache, transformers takes the repeated position of the patches for
            # the start of another packed sequence and cuts the attention there.
            attention_mask = torch.ones_like(image_mask, dtype=torch.long)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        if prompt is not None and outputs.past_key_values is not None:
            # How far the numbering is behind the length of the cache, for each prompt.
            length = outputs.past_key_values.get_seq_length()
            outputs.past_key_values.positions_behind = length - 1 - position_ids[:, -1:]
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.lm_head(outputs.last_hidden_state[:, kept]), None
        if labels is not None:
            vocabulary = self.config.padded_vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **kwargs)
        rest = {name: outputs[name] for name in outputs if name != "last_hidden_state"}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **rest)

    def generate(self, inputs=None, generation_config=None, streamer=None, **kwargs):
        """As transformers' own; returns the prompt as given (images unexpanded), then new tokens.

        ``max_length`` counts an image as its 1602 positions, as the model's context does.
        """
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if kwargs.get("max_new_tokens") is not None:
            # The official generation_config.json has a max_length, which transformers warns of.
            kwargs.setdefault("max_length", None)
        is_expanded = kwargs.get("image_mask") is not None
        if not is_expanded:
            check_embeddings(input_ids, kwargs.get("pixel_values"))
        as_is = input_ids is None or is_expanded
        if streamer is not None and not as_is:
            streamer = UnexpandedPrompt(streamer, input_ids)
        if streamer is not None and callable(how := kwargs.get("custom_generate")):
            # transformers would hand it no streamer, and a reader of one waits for ever.
            kwargs["custom_generate"], streamer = partial(how, streamer=streamer), None
        if as_is:
            return super().generate(input_ids, generation_config, streamer=streamer, **kwargs)
        given = (kwargs.pop(name, None) for name in ("attention_mask", "position_ids"))
        images = self._count_images(kwargs.get("pixel_values"))
        prompt = expand_image_positions(self.config, input_ids, *given, image_count=images)
        positions, config = prompt.input_ids.shape[1], generation_config or self.generation_config
        most = kwargs.get("max_length", config.max_length)
        if kwargs.get("max_new_tokens") or config.max_new_tokens:
            most = None
        if most is not None and positions >= most:
            raise ValueError(
                f"max_length is {most}, but the prompt alone takes {positions} positions, of which"
                f" an image has {self.config.vision_config.image_tokens}. Give max_new_tokens, the"
                " length of the answer, instead."
            )
        outputs = super().generate(
            prompt.input_ids,
            generation_config,
            streamer=streamer,
            attention_mask=prompt.attention_mask,
            position_ids=prompt.position_ids,
            image_mask=prompt.image_mask,
            **kwargs,
        )
        is_plain = isinstance(outputs, torch.Tensor)
        sequences = outputs if is_plain else outputs.sequences
        new_tokens = sequences[:, positions:]
        given = input_ids.repeat_interleave(len(sequences) // len(input_ids), 0)
        sequences = torch.cat((given.to(new_tokens.device), new_tokens), dim=1)
        if is_plain:
            return sequences
        outputs.sequences = sequences
        return outputs

    def prepare_inputs_for_generation(
        self, input_ids, image_mask=None, inputs_embeds=None, **kwargs
    ):
        """As transformers' own, with the image where its positions are computed."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        is_text = inputs.get("inputs_embeds") is None
        length = inputs["input_ids" if is_text else "inputs_embeds"].shape[1]
        # One token goes on from the cache, which has the image; a prompt brings it, and several
        # tokens, as speculative decoding verifies them, may come with it or after it.
        if image_mask is not None:
            has_image = False
            if length > 1 or not kwargs.get("use_cache", True):
                new = input_ids.shape[1] - image_mask.shape[1]
                inputs["image_mask"] = functional.pad(image_mask, (0, new))[:, -length:]
                has_image = bool(inputs["image_mask"].any())
            inputs["pixel_values"] = kwargs.get("pixel_values") if has_image else None
        return inputs

    def _expanded(self, input_ids, pixel_values, cache, *others) -> ExpandedPrompt | None:
        """The prompt with room for its images; None without any, and in decode steps."""
        is_prompt = input_ids is not None and input_ids.shape[1] > 1
        if pixel_values is None and (not is_prompt or torch.compiler.is_compiling()):
            return None
        images = self._count_images(pixel_values)
        has_image = bool(images or (input_ids == self.config.boi_token_id).any())
        if cache is not None and (cached := cache.get_seq_length()):
            if has_image:
                raise ValueError(
                    f"The cache holds {int(cached)} positions already, and here is an image."
                    " Expected the image in the prompt that begins the cache. Give the whole"
                    " conversation and a new cache, or after a prompt the new ids alone."
                )
            return None  # several tokens after a prompt, as speculative decoding verifies them
        if has_image:
            return expand_image_positions(self.config, input_ids, *others, images)
        length, limit = input_ids.shape[1], self.config.seq_length
        if length > limit:
            raise ValueError(
                f"The prompt has {length} tokens, but the model's context is {limit} (seq_length)."
                " Shorten the text."
            )
        return None

    def _check_mask(self, mask: torch.Tensor, cache, length: int):
        """Refuse the mask of a loop by hand in which the image has only the prompt's three ids."""
        if mask.ndim != 2 or torch.compiler.is_compiling():
            return
        positions = int(cache.get_seq_length()) + length
        if mask.shape[1] < positions:
            raise ValueError(
                f"attention_mask has the shape {tuple(mask.shape)}, but the cache and the new ids"
                f" have {positions} positions, of which an image has"
                f" {self.config.vision_config.image_tokens}. Leave it out where nothing is padding,"
                " or give one number for each position."
            )

    def _count_images(self, pixel_values: torch.Tensor | None) -> int:
        if pixel_values is None:
            return 0
        vision = self.config.vision_config
        expected = (vision.in_channels, vision.image_size, vision.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values has the shape {tuple(pixel_values.shape)}; expected (images,"
                f" {', '.join(map(str, expected))}), the image_size of config.json. Make them with"
                " the checkpoint's own processor (AutoProcessor)."
            )
        return len(pixel_values)
