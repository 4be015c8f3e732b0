"""Loading a checkpoint that is known to be whole, and what is refused before memory is taken."""

from collections import defaultdict
from copy import deepcopy
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from glm4v_nb.model.checkpoint_files import (
    LFS_POINTER,
    SMALL_FILES,
    check_files,
    local_directory,
    reading,
    refuse_adapter,
)
from glm4v_nb.model.configuration import check_dtype, read_config, refuse_attention
from glm4v_nb.model.official_names import keys_here, names_here
from glm4v_nb.model.quantised_files import (
    check_described,
    is_stored_in_4_bits,
    packed_shapes,
    weight_of,
)
from glm4v_nb.model.quantising import check_quantised, check_quantiser, check_stored
from simgpu.checkpoints import INDEX, read_json, weight_map
from simgpu.placement import check_names

_FLOATING = {"F64", "F32", "F16", "BF16"}


def load_checked(model_class, from_pretrained, name_or_path, *args, **kwargs):
    """Run transformers' loader on a checkpoint known to be whole, and refuse a partial result.

    Raises:
        FileNotFoundError: a shard named in the index is missing, or all safetensors weights are.
        ValueError: a file is damaged, leads elsewhere or names code; tensors of the model are
            missing or of other sizes than config.json says.
    """
    if kwargs.get("use_safetensors") is False:
        raise ValueError(
            "use_safetensors=False would load pickled weights, which can run any code. Only"
            " safetensors weights are loaded; leave the argument out."
        )
    if adapter := (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path"):
        refuse_adapter(adapter)
    # Nothing of this model is remote code. transformers would still run a directory's
    # custom_generate/generate.py.
    kwargs.pop("trust_remote_code", None)
    _check_options(kwargs)
    wants_info = kwargs.pop("output_loading_info", False)
    kwargs |= {"use_safetensors": True, "output_loading_info": True}
    source, config = name_or_path, kwargs.get("config")
    if name_or_path is not None:
        source = local_directory(name_or_path, (*SMALL_FILES, "*.safetensors"), **kwargs)
        directory = Path(source, kwargs.get("subfolder", ""))
        check_files(directory)
        if not isinstance(config, PreTrainedConfig):
            config = read_config(directory, **kwargs)
        check_weights(directory, model_class, config, kwargs.get("ignore_mismatched_sizes"))
    kwargs["device_map"] = keys_here(kwargs.get("device_map"))
    quantizer = kwargs.get("quantization_config")
    by_hand = kwargs["device_map"] if isinstance(kwargs["device_map"], dict) else {}
    if quantizer is not None or by_hand.keys() - {""}:
        with torch.device("meta"):
            meta_model = model_class(deepcopy(config))
    if by_hand.keys() - {""}:  # what a map forgets, transformers leaves on the CPU
        check_names(by_hand, meta_model)
    if quantizer is not None:
        check_quantiser(quantizer, kwargs.get("dtype"), meta_model)
    elif source and getattr(config, "quantization_config", None) is not None:
        written = read_json(directory / "config.json")  # what config has may have been overridden
        own = written.get("dtype") or written.get("torch_dtype")
        check_stored(written.get("quantization_config"), kwargs.get("dtype"), own)
    try:
        model, info = from_pretrained(source, *args, **kwargs)
    except RuntimeError as error:
        if "automatic conversion" not in str(error):
            raise
        raise ValueError(
            f"{name_or_path}: {_quantiser_name(quantizer)} failed at some weights; the report above"
            " names them and why. If it says that a card is out of memory, give a device_map that"
            " leaves it more room; else load without quantiser, or with load(..., weights=...)."
        ) from error
    if missing := sorted(info["missing_keys"]):
        if name_or_path is None:
            raise ValueError(
                f"state_dict has no values for {len(missing)} tensors of the model, first"
                f" {missing[0]!r}. Expected all of them, under their official names or those of"
                " model.state_dict(). Is it of another model?"
            )
        raise ValueError(
            f"{name_or_path}: {_quantiser_name(quantizer)} left {len(missing)} tensors without"
            f" weights, first {missing[0]!r}; the checkpoint itself is not at fault. Load without"
            " this quantiser, or with one of bitsandbytes or torchao (load(..., weights=...))."
        )
    if quantizer is not None:
        check_quantised(model)
    if source != name_or_path:
        model.name_or_path = model.config.name_or_path = str(name_or_path)
    return (model, info) if wants_info else model


def _quantiser_name(quantizer) -> str:
    return "the loader" if quantizer is None else type(quantizer).__name__


def _check_options(options: dict):
    """Refuse what transformers would refuse in words that lead astray."""
    check_dtype(options)
    configured = getattr(options.get("config"), "_attn_implementation", None)
    attention = options.get("attn_implementation") or configured
    if isinstance(attention, str) and ("/" in attention or attention.startswith("flash_")):
        refuse_attention(attention)
    for name in ("distributed_config", "tp_plan", "tp_size", "device_mesh"):
        if options.get(name) is not None:
            raise ValueError(
                f"{name} is given, but transformers' own splitting would cut the fused projections"
                " of the official layout in the wrong places. Expected one process. Under torchrun"
                ' use glm4v_nb.inference.load(checkpoint, parallel="tensor").'
            )
    for name in ("variant", "gguf_file", "transformers_weights"):
        if options.get(name) is not None:
            raise ValueError(
                f"{name} is {options[name]!r}, but weights are read from model.safetensors or its"
                " shards only: other files are not looked at first. Leave the argument out."
            )


def check_weights(
    directory: Path, model_class, config, accepts_other_sizes: bool | None = None
) -> tuple[int, list[str]]:
    """Compare the headers of the weights with index and configuration, before memory is taken.

    Returns:
        how many tensors the files hold, and the names of those that the model does not take.

    Raises:
        FileNotFoundError, ValueError: as ``load_checked``.
    """
    stored = _stored_tensors(directory)
    layers = config.num_layers + config.vision_config.num_hidden_layers
    again = "Download config.json and the weights again, from the same checkpoint."
    if layers > len(stored):  # even without memory, so many would take minutes to build
        raise ValueError(
            f"{directory}: config.json describes {layers:,} layers, but the weights lack tensors"
            f" for most of them: they have {len(stored):,}. {again}"
        )
    config = deepcopy(config)
    config._attn_implementation = "eager"  # whatever was asked for is looked at by the loader
    with torch.device("meta"), reading(directory / "config.json"):
        model = model_class(config)
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    quantiser = getattr(config, "quantization_config", None)
    is_quantized = quantiser is not None
    other_sizes, taken, left = [], set(), []
    for name, (shape, dtype) in stored.items():
        weight = weight_of(name) if is_quantized else name
        here = names_here(weight)
        if taken.intersection(here):
            raise ValueError(
                f"{directory}: {name!r} is there twice, under its official name and under that of"
                f" the module. Expected each once. {again}"
            )
        parts = [wanted.pop(part) for part in here if part in wanted]
        taken.update(here if parts else ())
        if not parts:
            left.append(name)
        expected = [sum(rows for rows, *_ in parts), *parts[0][1:]] if parts else None
        if weight != name and parts and shape not in packed_shapes(expected):
            other_sizes.append(f"{name!r}: {tuple(shape)}, packed of {tuple(expected)}")
        if not parts or (is_quantized and dtype not in _FLOATING):
            continue
        if dtype not in _FLOATING:
            raise ValueError(
                f"{directory}: {name!r} is of type {dtype}. Expected weights of a floating type."
                " Download the weights again."
            )
        if shape != expected and not is_stored_in_4_bits(quantiser, shape, dtype, expected):
            other_sizes.append(f"{name!r}: {tuple(shape)}, expected {tuple(expected)}")
    if wanted:
        raise ValueError(
            f"{directory}: the checkpoint lacks {len(wanted)} tensors of the model, first"
            f" {min(wanted)!r}; the model would answer from random weights. Download the checkpoint"
            " again, and check that config.json belongs to it."
        )
    if other_sizes and not accepts_other_sizes:
        raise ValueError(
            f"{directory}: {len(other_sizes)} tensors have other sizes than config.json describes,"
            f" first {other_sizes[0]}. {again}"
        )
    return len(stored), left


def weight_files(directory: Path) -> dict[str, set[str]]:
    """The names of the weights files, and the tensors that an index places in each.

    Raises:
        FileNotFoundError, ValueError: as ``load_checked``.
    """
    single_file = "model.safetensors"
    if (directory / INDEX).is_file():
        places = weight_map(directory)
        if not isinstance(read_json(directory / INDEX).get("metadata"), dict):
            raise ValueError(
                f'{directory / INDEX} has no object "metadata", which transformers reads. Add'
                ' "metadata": {} or download the file again.'
            )
    if (directory / single_file).is_file():  # which transformers prefers to shards
        return {single_file: set()}
    if not (directory / INDEX).is_file():
        reason = "no weights at all"
        for pickled in [*sorted(directory.glob("*.bin")), *sorted(directory.glob("*.pt*"))][:1]:
            reason = f"only pickled weights ({pickled.name}), which can run any code when loaded"
        raise FileNotFoundError(
            f"{directory} holds {reason}; expected model.safetensors or {INDEX} with its shards."
            " Download the safetensors files of the checkpoint."
        )
    tensors_by_shard = defaultdict(set)
    for tensor, shard in places.items():
        tensors_by_shard[shard].add(tensor)
    absent = sorted(shard for shard in tensors_by_shard if not (directory / shard).is_file())
    if absent:
        raise FileNotFoundError(
            f"{directory}: {len(absent)} of {len(tensors_by_shard)} shards named in {INDEX} are"
            f" missing, first {absent[0]}. Download the missing files into this directory."
        )
    return dict(tensors_by_shard)


def _stored_tensors(directory: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and type of every tensor in the weights files, each compared with the index."""
    stored = {}
    for shard, expected in weight_files(directory).items():
        found = _header(directory / shard)
        lacking = sorted(expected - found.keys())
        if lacking:
            raise ValueError(
                f"{directory / shard} lacks {len(lacking)} tensors that the index places in it,"
                f" first {lacking[0]!r}. The index and the shard are of different checkpoints;"
                " download both again."
            )
        if twice := sorted(found.keys() & stored.keys()):
            raise ValueError(
                f"{directory / shard} holds {len(twice)} tensors that another shard has too, first"
                f" {twice[0]!r}. Expected each once. Download the weights and their index again."
            )
        stored |= found
    return stored


def _header(path: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and type of every tensor in a safetensors file."""
    try:
        with path.open("rb") as file:
            if file.read(40).startswith(LFS_POINTER):
                raise ValueError(
                    f"{path} is a Git LFS pointer, not the weights themselves. Run `git lfs pull`"
                    " in the checkpoint's directory, or download the file again."
                )
        # Opening compares the header with the size of the file, so a truncated file fails here.
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            found = {name: (one.get_shape(), one.get_dtype()) for name, one in slices.items()}
            shapes = {name: shape for name, (shape, _) in found.items()}
            check_described(path, file.metadata(), shapes)
            return found
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged ({path.stat().st_size:,} bytes; {error}). Expected a complete"
            " safetensors file. Delete it and download it again."
        ) from error
