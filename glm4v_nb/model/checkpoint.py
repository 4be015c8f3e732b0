"""The official checkpoint layout: how its tensor names map to the modules here, and which files are
refused.

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
    """Cut the decoder's fused projection along rows: the query heads, the key groups, the value
    groups.

    transformers 5.23 has a generic ``Split``; 5.17, which is also supported, has only equal chunks.
    """

    @torch.no_grad
    def convert(self, input_dict, source_patterns, target_patterns, config=None, **kwargs):
        (fused,) = input_dict.values()
        fused = fused[0] if isinstance(fused, list) else fused
        query_rows = config.num_attention_heads * config.kv_channels
        group_rows = config.multi_query_group_num * config.kv_channels
        parts = fused.split([query_rows, group_rows, group_rows], dim=0)
        # Contiguous copies, so that no part keeps the whole fused tensor alive.
        return {
            target: part.contiguous() for target, part in zip(target_patterns, parts, strict=True)
        }

    @property
    def reverse_op(self) -> ConversionOps:
        return JoinQueryKeyValue(dim=0)


class JoinQueryKeyValue(Concatenate):
    """The reverse, used when saving."""

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitQueryKeyValue()


def official_layout() -> list:
    """The conversions between official tensor names and the modules here, in transformers'
    terms."""
    renamings = [WeightRenaming(source, target) for source, target in RENAMINGS.items()]
    splits = [
        WeightConverter(
            f"self_attention.query_key_value.{kind}",
            [f"self_attn.{part}_proj.{kind}" for part in "qkv"],
            operations=[SplitQueryKeyValue()],
        )
        for kind in ("weight", "bias")
    ]
    return renamings + splits


def register_official_layout(class_name: str):
    """Make transformers load and save the official layout for the model class of this name."""
    register_checkpoint_conversion_mapping(class_name, official_layout(), overwrite=True)


def load_checked(from_pretrained, name_or_path, *args, **kwargs):
    """Run transformers' loader on a checkpoint that is known to be whole, and refuse a partial
    result.

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
    kwargs["use_safetensors"] = True
    # Nothing of this model is remote code. transformers would still run a directory's
    # custom_generate/generate.py.
    kwargs.pop("trust_remote_code", None)
    wants_info = kwargs.pop("output_loading_info", False)
    if name_or_path is not None and Path(name_or_path).is_dir():
        check_weight_files(Path(name_or_path) / kwargs.get("subfolder", ""))
    # transformers refuses other sizes without saying which; its report is only logged.
    accepts_other_sizes = kwargs.pop("ignore_mismatched_sizes", False)
    kwargs.update(output_loading_info=True, ignore_mismatched_sizes=True)
    model, info = from_pretrained(name_or_path, *args, **kwargs)
    if info["mismatched_keys"] and not accepts_other_sizes:
        name, found, expected = sorted(info["mismatched_keys"])[0]
        raise ValueError(
            f"{name_or_path}: {len(info['mismatched_keys'])} tensors have other sizes than"
            f" config.json describes, first {name!r}: {tuple(found)}, expected {tuple(expected)}."
            " Download config.json and the weights again, from the same checkpoint."
        )
    missing = sorted(info["missing_keys"])
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
    return _read_index(index_file) if index_file.is_file() else {}


def check_weight_files(directory: Path):
    """Compare every weights file of a local checkpoint with the index; reads headers, not
    weights."""
    index_file = directory / INDEX
    single_file = directory / "model.safetensors"
    if index_file.is_file():
        files = _indexed_files(index_file)
    elif single_file.is_file():
        files = {single_file: None}
    else:
        pickled = sorted(path.name for path in directory.glob("*.bin")) or sorted(
            path.name for path in directory.glob("*.pt*")
        )
        reason = (
            f"only pickled weights ({pickled[0]}), which can run any code when loaded"
            if pickled
            else "no weights at all"
        )
        raise FileNotFoundError(
            f"{directory} holds {reason}; expected model.safetensors or"
            " model.safetensors.index.json with its shards. Download the safetensors files of the"
            " checkpoint."
        )
    for path, expected in files.items():
        _check_safetensors(path, expected)


def _read_index(index_file: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index_file.read_text())["weight_map"].items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index_file} is not a safetensors index ({error!r}): expected JSON with a"
            ' "weight_map". Download the file again.'
        ) from error


def _indexed_files(index_file: Path) -> dict[Path, set[str]]:
    files: dict[Path, set[str]] = {}
    for tensor, shard in _read_index(index_file).items():
        files.setdefault(index_file.parent / shard, set()).add(tensor)
    absent = sorted(path.name for path in files if not path.is_file())
    if absent:
        raise FileNotFoundError(
            f"{index_file.parent}: {len(absent)} of {len(files)} shards named in {index_file.name}"
            f" are missing, first {absent[0]}. Download the missing files into this directory."
        )
    return files


def _check_safetensors(path: Path, expected: set[str] | None):
    try:
        # Opening compares the header with the size of the file, so a truncated file fails here.
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged ({path.stat().st_size:,} bytes; {error}). Expected a complete"
            " safetensors file. Delete it and download it again."
        ) from error
    lacking = sorted((expected or set()) - names)
    if lacking:
        raise ValueError(
            f"{path} lacks {len(lacking)} tensors that the index places in it, first"
            f" {lacking[0]!r}. The index and the shard are of different checkpoints; download both"
            " again."
        )
