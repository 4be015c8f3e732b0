"""The official layout: how its tensor names map to the modules here, and what is refused.

Renaming and splitting happen inside transformers' own loader (and in reverse in
``save_pretrained``), through the mapping registered by ``register_official_layout``.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    WeightConverter,
    WeightRenaming,
)

INDEX = "model.safetensors.index.json"
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


class SplitQueryKeyValue(ConversionOps):
    """Cut the decoder's fused projection along rows: query heads, key groups, value groups.

    transformers 5.23 has a generic ``Split``; 5.17, which is also supported, has only equal chunks.
    """

    @torch.no_grad
    def convert(self, input_dict, source_patterns, target_patterns, config=None, **kwargs):
        (fused,) = input_dict.values()
        fused = fused[0] if isinstance(fused, list) else fused
        query_rows = config.num_attention_heads * config.kv_channels
        group_rows = config.multi_query_group_num * config.kv_channels
        parts = fused.split([query_rows, group_rows, group_rows], dim=0)
        # Copies, so that no part keeps the whole fused tensor alive.
        return dict(zip(target_patterns, (part.contiguous() for part in parts), strict=True))

    @property
    def reverse_op(self) -> ConversionOps:
        return JoinQueryKeyValue(dim=0)


class JoinQueryKeyValue(Concatenate):
    """The reverse, used when saving."""

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitQueryKeyValue()


def register_official_layout(class_name: str):
    """Make transformers load and save the official layout for the model class of this name."""
    renamings = [WeightRenaming(source, target) for source, target in RENAMINGS.items()]
    splits = [
        WeightConverter(
            f"self_attention.query_key_value.{kind}",
            [f"self_attn.{part}_proj.{kind}" for part in "qkv"],
            operations=[SplitQueryKeyValue()],
        )
        for kind in ("weight", "bias")
    ]
    register_checkpoint_conversion_mapping(class_name, renamings + splits, overwrite=True)


def load_checked(from_pretrained, name_or_path, *args, **kwargs):
    """Run transformers' loader on a checkpoint known to be whole, and refuse a partial result.

    Raises:
        FileNotFoundError: a shard named in the index is missing, or there are no safetensors
            weights.
        ValueError: a weights file is damaged, or the checkpoint lacks tensors of the model or has
            them in other sizes.
    """
    if kwargs.get("use_safetensors") is False:
        raise ValueError(
            "use_safetensors=False would load pickled weights, which can run any code. Only"
            " safetensors weights are loaded; leave the argument out."
        )
    # Nothing of this model is remote code. transformers would still run a directory's
    # custom_generate/generate.py.
    kwargs.pop("trust_remote_code", None)
    wants_info = kwargs.pop("output_loading_info", False)
    # transformers refuses other sizes without saying which; its report is only logged.
    accepts_other_sizes = kwargs.pop("ignore_mismatched_sizes", False)
    kwargs |= dict.fromkeys(
        ("use_safetensors", "output_loading_info", "ignore_mismatched_sizes"), True
    )
    if name_or_path is not None and Path(name_or_path).is_dir():
        check_weight_files(Path(name_or_path) / kwargs.get("subfolder", ""))
    model, info = from_pretrained(name_or_path, *args, **kwargs)
    mismatched, missing = sorted(info["mismatched_keys"]), sorted(info["missing_keys"])
    if mismatched and not accepts_other_sizes:
        name, found, expected = mismatched[0]
        raise ValueError(
            f"{name_or_path}: {len(mismatched)} tensors have other sizes than config.json"
            f" describes, first {name!r}: {tuple(found)}, expected {tuple(expected)}. Download"
            " config.json and the weights again, from the same checkpoint."
        )
    if missing:
        raise ValueError(
            f"{name_or_path}: the checkpoint lacks {len(missing)} tensors of the model, first"
            f" {missing[0]!r}; the model would answer from random weights. Download the checkpoint"
            " again, and check that config.json belongs to it."
        )
    return (model, info) if wants_info else model


def weight_map(directory: Path) -> dict[str, str]:
    """The file of every tensor of a checkpoint that has an index; {} for any other.

    Raises:
        ValueError: the index is damaged.
    """
    index_file = directory / INDEX
    if not index_file.is_file():
        return {}
    try:
        return dict(json.loads(index_file.read_text())["weight_map"].items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index_file} is not a safetensors index ({error!r}): expected JSON with a"
            ' "weight_map". Download the file again.'
        ) from error


def check_weight_files(directory: Path):
    """Compare every weights file of a local checkpoint with the index; reads headers, not weights.

    Raises:
        FileNotFoundError, ValueError: as ``load_checked``.
    """
    single_file = directory / "model.safetensors"
    if not (directory / INDEX).is_file():
        if not single_file.is_file():
            raise FileNotFoundError(_without_weights(directory))
        _check_safetensors(single_file, set())
        return
    tensors_by_shard: dict[str, set[str]] = {}
    for tensor, shard in weight_map(directory).items():
        tensors_by_shard.setdefault(shard, set()).add(tensor)
    absent = sorted(shard for shard in tensors_by_shard if not (directory / shard).is_file())
    if absent:
        raise FileNotFoundError(
            f"{directory}: {len(absent)} of {len(tensors_by_shard)} shards named in {INDEX} are"
            f" missing, first {absent[0]}. Download the missing files into this directory."
        )
    for shard, tensors in tensors_by_shard.items():
        _check_safetensors(directory / shard, tensors)


def _without_weights(directory: Path) -> str:
    pickled = [*sorted(directory.glob("*.bin")), *sorted(directory.glob("*.pt*"))]
    reason = "no weights at all"
    if pickled:
        reason = f"only pickled weights ({pickled[0].name}), which can run any code when loaded"
    return (
        f"{directory} holds {reason}; expected model.safetensors or {INDEX} with its shards."
        " Download the safetensors files of the checkpoint."
    )


def _check_safetensors(path: Path, expected: set[str]):
    try:
        # Opening compares the header with the size of the file, so a truncated file fails here.
        with safe_open(path, framework="pt") as file:
            lacking = sorted(expected - set(file.keys()))
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged ({path.stat().st_size:,} bytes; {error}). Expected a complete"
            " safetensors file. Delete it and download it again."
        ) from error
    if lacking:
        raise ValueError(
            f"{path} lacks {len(lacking)} tensors that the index places in it, first"
            f" {lacking[0]!r}. The index and the shard are of different checkpoints; download both"
            " again."
        )
