"""Official names wherever people write them: in state dicts, device maps, LoRA targets, skip lists.

The official implementation (zai-org/glm-4v-9b) calls its parts ``transformer.vision``,
``transformer.encoder.layers.0.self_attention.query_key_value`` and so on. Checkpoints on disk keep
these names; the modules here have those of transformers' ``GlmModel``. What this module translates
is what tutorials and fine-tuning scripts for the official code contain.
"""

import re
from collections.abc import Iterable, Mapping
from functools import partial
from inspect import signature

import torch
from transformers import conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    WeightConverter,
    WeightRenaming,
)
from wrapt import when_imported, wrap_function_wrapper

# Official name -> name here. Every pattern is anchored on a part that no other tensor has, so that
# both directions are unambiguous: the tower and the decoder share leaf names such as
# "query_key_value" and "dense_4h_to_h".
RENAMINGS = {
    r"^transformer.embedding.word_embeddings.": "^language_model.embed_tokens.",
    r"^transformer.encoder.layers.": "^language_model.layers.",
    r"^transformer.encoder.final_layernorm.": "^language_model.norm.",
    r"^transformer.output_layer.": "^lm_head.",
    r"^transformer.vision.patch_embedding.": "^vision_tower.patch_embedding.",
    r"^transformer.vision.transformer.layers.": "^vision_tower.layers.",
    r"^transformer.vision.conv.": "^vision_tower.conv.",
    r"^transformer.vision.linear_proj.": "^vision_tower.linear_proj.",
    r"^transformer.vision.boi": "^vision_tower.boundary.boi",
    r"^transformer.vision.eoi": "^vision_tower.boundary.eoi",
    r"self_attention.dense.": "self_attn.o_proj.",
    r".mlp.dense_h_to_4h.": ".mlp.gate_up_proj.",
    r".mlp.dense_4h_to_h.": ".mlp.down_proj.",
}
FUSED, PARTS = "self_attention.query_key_value.", tuple(f"self_attn.{part}_proj." for part in "qkv")
# Modules that hold several of the above, as device maps and skip lists name them.
_CONTAINERS = {
    "transformer": ("vision_tower", "language_model", "lm_head"),
    "transformer.embedding": ("language_model.embed_tokens",),
    "transformer.rotary_pos_emb": ("language_model.rotary_emb",),
    "transformer.encoder": ("language_model.layers", "language_model.norm"),
    "transformer.vision": ("vision_tower",),
    "transformer.vision.transformer": ("vision_tower.layers",),
}
# Last parts of names, which LoRA targets and skip lists match alone. The tower's keep theirs.
_LEAVES = {
    "query_key_value": ("q_proj", "k_proj", "v_proj", "query_key_value"),
    "dense": ("o_proj", "dense"),
    "dense_h_to_4h": ("gate_up_proj", "dense_h_to_4h"),
    "dense_4h_to_h": ("down_proj", "dense_4h_to_h"),
    "self_attention": ("self_attn",),
    "output_layer": ("lm_head",),
    "word_embeddings": ("embed_tokens",),
    "embedding": ("embed_tokens",),
    "final_layernorm": ("norm",),
    "vision": ("vision_tower",),
    "encoder": ("language_model.layers", "language_model.norm"),
}
_TOPMOST = ("encoder.", "vision.", "embedding.", "output_layer.")


def names_here(official: str) -> list[str]:
    """Names of the modules or tensors here that an official name, or only its last part, stands
    for: three for the decoder's fused projection. Other names are kept."""
    for known in (_CONTAINERS, _LEAVES):
        if official in known:
            return list(known[official])
    if official.startswith(_TOPMOST):  # without the first part, as LoRA targets may be given
        official = f"transformer.{official}"
    if "." not in official:
        return [official]
    name = f"{official}." if official.startswith("transformer.") else f".{official}."
    for pattern, replacement in RENAMINGS.items():
        name = re.sub(pattern, replacement.removeprefix("^"), name, count=1)
    parts = [name.replace(FUSED, part) for part in PARTS] if FUSED in name else [name]
    return [part.strip(".") for part in parts]


def split_fused(fused: torch.Tensor, config) -> list[torch.Tensor]:
    """Rows of the decoder's fused projection: those of the queries, of the keys, of the values.

    Raises:
        ValueError: it has other rows than these.
    """
    group_rows = config.multi_query_group_num * config.kv_channels
    rows = [config.num_attention_heads * config.kv_channels, group_rows, group_rows]
    if len(fused) != sum(rows):
        raise ValueError(
            f"A query_key_value of the decoder has {len(fused)} rows; expected {sum(rows)}: those"
            " of queries, keys and values in config.json. Take both from the same checkpoint."
        )
    return list(fused.split(rows))


@torch.no_grad
def unshare_storage(attention: torch.nn.Module):
    """Give queries, keys and values storages of their own where the three fill one."""
    for kind in ("weight", "bias"):
        parts = [getattr(getattr(attention, f"{part}_proj"), kind, None) for part in "qkv"]
        if any(part is None for part in parts):
            continue
        whole = sum(part.nbytes for part in parts)
        if all(part.untyped_storage().nbytes() == whole for part in parts):
            for part in parts:
                part.data = part.data.clone()


# transformers 5.23 has a generic ``Split``; 5.17, which is also supported, only equal chunks.
class SplitQueryKeyValue(ConversionOps):
    """Cut the decoder's fused projection along rows: query heads, key groups, value groups."""

    @torch.no_grad
    def convert(self, input_dict, source_patterns, target_patterns, config=None, **kwargs):
        (fused,) = input_dict.values()
        fused = fused[0] if isinstance(fused, list) else fused
        # Parts of one storage: rows are contiguous, and a copy would take memory while loading.
        return dict(zip(target_patterns, split_fused(fused, config), strict=True))

    @property
    def reverse_op(self) -> ConversionOps:
        return JoinQueryKeyValue(dim=0)


class JoinQueryKeyValue(Concatenate):
    """The reverse, used when saving."""

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitQueryKeyValue()


class FusedConverter(WeightConverter):
    """Cuts first, and then lets a quantiser have the parts one by one, under their own names: that
    of torchao takes one tensor and drops what comes with it."""

    __slots__ = ()

    def convert(self, layer_name, model=None, config=None, hf_quantizer=None, loading_info=None):
        parts = super().convert(layer_name, model, config, None, loading_info)
        if hf_quantizer is None or self.quantization_operation is None:
            return parts
        quantised = {}
        for name, part in parts.items():
            one = WeightRenaming(name, name)
            one.quantization_operation = self.quantization_operation
            one.collected_tensors[name].append(part)
            quantised |= one.convert(name, model, config, hf_quantizer, loading_info)
        return quantised


def register_official_layout(class_name: str):
    """Make transformers load and save the official layout for the model class of this name."""
    renamings = [WeightRenaming(source, target) for source, target in RENAMINGS.items()]
    splits = [
        FusedConverter(
            f"{FUSED}{kind}", [f"{part}{kind}" for part in PARTS], operations=[SplitQueryKeyValue()]
        )
        for kind in ("weight", "bias")
    ]
    mapping = renamings + splits
    conversion_mapping.register_checkpoint_conversion_mapping(class_name, mapping, overwrite=True)


def state_dict_here(state_dict: Mapping[str, torch.Tensor], config) -> dict[str, torch.Tensor]:
    """A state dict with official names under the names here; other names are kept, and a buffer
    that every loader computes anew is left out.

    Also of a LoRA adapter that was trained on the official implementation: its fused projection has
    one A, which the three here share, and a B that is cut along its rows as the weight is.
    """
    translated = {}
    for name, tensor in state_dict.items():
        prefix, found, rest = name.partition("transformer.")
        is_ours = found and prefix in ("", "module.", "base_model.model.", "model.")
        targets = names_here(f"transformer.{rest}") if is_ours else [name]
        if is_ours and rest == "rotary_pos_emb.inv_freq":
            continue
        if targets == [name]:
            translated[name] = tensor
        elif len(targets) == 1:
            translated[prefix + targets[0]] = tensor
        else:
            is_shared = ".lora_A." in name or name.endswith(".lora_A")
            parts = [tensor] * len(targets) if is_shared else split_fused(tensor, config)
            for target, part in zip(targets, parts, strict=True):
                translated[prefix + target] = part.clone()
    return translated


def keys_here(given, parts: bool = True):
    """A device map, or another dictionary by modules, whose names may be official ones, or with
    ``parts`` the last parts of such; anything but a dictionary is kept.

    Raises:
        ValueError: a module has two different entries, under its official name and that here.
    """
    if not isinstance(given, dict):
        return given
    translated = {}
    for name, value in given.items():
        for here in names_here(name) if parts or name.startswith("transformer") else [name]:
            if translated.setdefault(here, value) != value:
                raise ValueError(
                    f"{name!r} is {here!r} here, which has {translated[here]!r} already, and"
                    f" {value!r} is another. Give each module one entry."
                )
    return translated


def modules_here(names: Iterable[str] | str):
    """A list of modules, as LoRA targets and quantisers' skip lists are, under the names here.

    Raises:
        ValueError: a regular expression that asks for official names.
    """
    if not isinstance(names, str):
        return list(dict.fromkeys(here for name in names for here in names_here(name)))
    # Names of the tower's modules are official ones too.
    shared = () if "vision_tower" in names else ("query_key_value", "dense")
    words = (*shared, "transformer", "encoder", "self_attention", "output_layer", "word_embeddings")
    asked = [word for word in words if word in names]
    if asked:
        raise ValueError(
            f"the pattern {names!r} asks for the official name {asked[0]!r}, which the decoder's"
            " modules here do not have. Name them as here: q_proj, k_proj, v_proj, o_proj,"
            " gate_up_proj and down_proj of language_model.layers, query_key_value and dense of"
            " vision_tower; or give a list of names, in which official ones are understood."
        )
    return names


# Where accelerate has the function that loads by the names of modules, and peft the one that loads
# an adapter's weights, for their own use and ours.
_ROOMS = ("", ".utils", ".utils.modeling", ".big_modeling")
_PEFT_ROOMS = ("", ".utils", ".utils.save_and_load", ".peft_model", ".functional")
# Fields of peft's configurations that name modules or parameters: in lists, and as keys.
_LISTS = ("target_modules", "target_parameters", "feedforward_modules")
_LISTS += ("modules_to_save", "exclude_modules")
_BY_NAME = ("rank_pattern", "alpha_pattern", "trainable_token_indices")


def _is_ours(model) -> bool:
    return type(model).__name__ == "GLM4VForConditionalGeneration"


def understand_official_names():
    """Let peft and accelerate take official names for this model, and this model only."""
    for module, name, wrapper in (
        ("peft.tuners.tuners_utils", "BaseTuner.inject_adapter", _inject_adapter),
        *((f"peft{room}", "set_peft_model_state_dict", _adapter_weights) for room in _PEFT_ROOMS),
        *((f"accelerate{room}", "load_checkpoint_in_model", _refuse_layout) for room in _ROOMS),
    ):
        when_imported(module)(partial(wrap_function_wrapper, name=name, wrapper=wrapper))


def _inject_adapter(wrapped, tuner, args, kwargs):
    model = args[0] if args else kwargs["model"]
    if _is_ours(model):
        config = tuner.peft_config[args[1] if len(args) > 1 else kwargs["adapter_name"]]
        parameters = getattr(config, "target_parameters", None)
        if getattr(config, "target_modules", "") is None and not parameters:
            # What this method of peft takes for model_type "chatglm", if it has a default at all.
            defaults = getattr(tuner, "target_module_mapping", {})
            config.target_modules = defaults.get(model.config.model_type)
        for field in _LISTS:
            if given := getattr(config, field, None):
                setattr(config, field, type(given)(modules_here(given)))
        for field in _BY_NAME:
            if given := getattr(config, field, None):
                for name in given:
                    if isinstance(name, str) and not re.fullmatch(r"[\w.]+", name):
                        modules_here(name)  # a pattern: refused if it asks for official names
                setattr(config, field, keys_here(given))
    return wrapped(*args, **kwargs)


def _adapter_weights(wrapped, _, args, kwargs):
    call = signature(wrapped).bind(*args, **kwargs)
    model = call.arguments["model"]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if _is_ours(base):
        weights = call.arguments["peft_model_state_dict"]
        call.arguments["peft_model_state_dict"] = state_dict_here(weights, base.config)
    return wrapped(*call.args, **call.kwargs)


def _refuse_layout(wrapped, _, args, kwargs):
    model = args[0] if args else kwargs["model"]
    if _is_ours(model):
        raise ValueError(
            "load_checkpoint_and_dispatch and load_checkpoint_in_model take tensors by the names of"
            " the modules, and checkpoints of GLM-4V-9B have the official ones. Use"
            " AutoModelForCausalLM.from_pretrained(checkpoint, device_map=...), which translates"
            " them and dispatches the model as well."
        )
    return wrapped(*args, **kwargs)
