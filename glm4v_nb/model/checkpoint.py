"""The official layout: how its tensor names map to the modules here, and what is refused.

Renaming and splitting happen inside transformers' own loader (and in reverse in
``save_pretrained``), through the mapping registered by ``register_official_layout``.
"""

from collections import defaultdict
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

from glm4v_nb.model.configuration import check_dtype
from glm4v_nb.model.official_names import (
    FUSED,
    PARTS,
    RENAMINGS,
    device_map_here,
    modules_here,
    split_fused,
)
from simgpu.checkpoints import INDEX, weight_map


# transformers 5.23 has a generic ``Split``; 5.17, which is also supported, only equal chunks.
class SplitQueryKeyValue(ConversionOps):
    """Cut the decoder's fused projection along rows: query heads, key groups, value groups."""

    @torch.no_grad
    def convert(self, input_dict, source_patterns, target_patterns, config=None, **kwargs):
        (fused,) = input_dict.values()
        fused = fused[0] if isinstance(fused, list) else fused
        parts = split_fused(fused, config)
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
            f"{FUSED}{kind}", [f"{part}{kind}" for part in PARTS], operations=[SplitQueryKeyValue()]
        )
        for kind in ("weight", "bias")
    ]
    register_checkpoint_conversion_mapping(class_name, renamings + splits, overwrite=True)


def load_checked(from_pretrained, name_or_path, *args, **kwargs):
    """Run transformers' loader on a checkpoint known to be whole, and refuse a partial result.

    Raises:
        FileNotFoundError: a shard named in the index is missing, or all safetensors weights are.
        ValueError: a weights file is damaged; tensors of the model are missing or of other sizes.
    """
    if kwargs.get("use_safetensors") is False:
        raise ValueError(
            "use_safetensors=False would load pickled weights, which can run any code. Only"
            " safetensors weights are loaded; leave the argument out."
        )
    # Nothing of this model is remote code. transformers would still run a directory's
    # custom_generate/generate.py.
    kwargs.pop("trust_remote_code", None)
    _check_options(kwargs)
    wants_info = kwargs.pop("output_loading_info", False)
    # transformers refuses other sizes without saying which; its report is only logged.
    accepts_other_sizes = kwargs.pop("ignore_mismatched_sizes", False)
    asked = ("use_safetensors", "output_loading_info", "ignore_mismatched_sizes")
    kwargs |= dict.fromkeys(asked, True)
    if name_or_path is not None and Path(name_or_path).is_dir():
        check_weight_files(Path(name_or_path) / kwargs.get("subfolder", ""))
    kwargs["device_map"] = device_map_here(kwargs.get("device_map"))
    quantizer = kwargs.get("quantization_config")
    for field in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if given := getattr(quantizer, field, None):
            setattr(quantizer, field, modules_here(given))
    model, info = from_pretrained(name_or_path, *args, **kwargs)
    mismatched, missing = sorted(info["mismatched_keys"]), sorted(info["missing_keys"])
    if mismatched and not accepts_other_sizes:
        name, found, expected = mismatched[0]
        raise ValueError(
            f"{name_or_path}: {len(mismatched)} tensors have other sizes than config.json"
            f" describes, first {name!r}: {tuple(found)}, expected {tuple(expected)}. Download"
            " config.json and the weights again, from the same checkpoint."
        )
    if missing and quantizer is not None:
        raise ValueError(
            f"{name_or_path}: {type(quantizer).__name__} left {len(missing)} tensors without"
            f" weights, first {missing[0]!r}; the checkpoint itself is not at fault. This quantiser"
            " does not go with the fused projections of the official layout. Load without it, or"
            " quantise the loaded model."
        )
    if missing:
        raise ValueError(
            f"{name_or_path}: the checkpoint lacks {len(missing)} tensors of the model, first"
            f" {missing[0]!r}; the model would answer from random weights. Download the checkpoint"
            " again, and check that config.json belongs to it."
        )
    return (model, info) if wants_info else model


def _check_options(options: dict):
    """Refuse what transformers would refuse in words that lead astray."""
    check_dtype(options.get("dtype", options.get("torch_dtype")))
    configured = getattr(options.get("config"), "_attn_implementation", None)
    attention = options.get("attn_implementation") or configured
    if isinstance(attention, str) and ("/" in attention or attention.startswith("flash_")):
        raise ValueError(
            f'attn_implementation is {attention!r}. Expected "sdpa" or "eager": nothing is fetched'
            ' from the hub, and with "sdpa", the default, PyTorch picks its own flash attention'
            " where the card has one. Leave the argument out, also of config.json."
        )


def check_weight_files(directory: Path):
    """Compare every weights file with the index by its header; raises as ``load_checked``."""
    single_file = directory / "model.safetensors"
    if not (directory / INDEX).is_file():
        if not single_file.is_file():
            reason = "no weights at all"
            for pickled in [*sorted(directory.glob("*.bin")), *sorted(directory.glob("*.pt*"))][:1]:
                reason = (
                    f"only pickled weights ({pickled.name}), which can run any code when loaded"
                )
            raise FileNotFoundError(
                f"{directory} holds {reason}; expected model.safetensors or {INDEX} with its"
                " shards. Download the safetensors files of the checkpoint."
            )
        _check_safetensors(single_file, set())
        return
    tensors_by_shard = defaultdict(set)
    for tensor, shard in weight_map(directory).items():
        tensors_by_shard[shard].add(tensor)
    absent = sorted(shard for shard in tensors_by_shard if not (directory / shard).is_file())
    if absent:
        raise FileNotFoundError(
            f"{directory}: {len(absent)} of {len(tensors_by_shard)} shards named in {INDEX} are"
            f" missing, first {absent[0]}. Download the missing files into this directory."
        )
    for shard, tensors in tensors_by_shard.items():
        _check_safetensors(directory / shard, tensors)


def _check_safetensors(path: Path, expected: set[str]):
    with path.open("rb") as file:
        is_pointer = file.read(40).startswith(b"version https://git-lfs")
    if is_pointer:
        raise ValueError(
            f"{path} is a Git LFS pointer, not the weights themselves. Run `git lfs pull` in the"
            " checkpoint's directory, or download the file again."
        )
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
