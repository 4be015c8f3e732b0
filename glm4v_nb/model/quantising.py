"""Quantised weights through bitsandbytes and torchao: what is asked for, and what cannot be had.

A quantiser takes a list of modules to leave alone. A name in it that stands for nothing, and rows
that its groups do not divide, it passes over in silence; here both are said.
"""

import importlib
import importlib.util
import re
from copy import deepcopy

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from glm4v_nb.model.configuration import check_dtype
from glm4v_nb.model.official_names import modules_here

# What ``weights`` may be, and the library whose kernels it takes.
WEIGHTS = {"int8": "torchao", "int4": "torchao", "nf4": "bitsandbytes"}
# Modules that are left as they are unless the caller says otherwise: docs/quantising.md has the
# measurements. The embedding is no matrix product, and no quantiser takes it unasked.
KEEP = ("lm_head",)
GROUPS = (128, 64, 32)  # of int4, the largest that divides all rows
_SKIP_FIELDS = ("llm_int8_skip_modules", "modules_to_not_convert")
_HALF = torch.float16
_INT4_CAPABILITY = (8, 0)  # torch's _weight_int4pack_mm is compiled for Ampere and newer


def quantiser_for(weights: str, config, dtype: torch.dtype | str, keep=KEEP):
    """What ``from_pretrained`` takes as ``quantization_config`` for one of ``WEIGHTS``.

    Args:
        config: of the checkpoint; the rows of its matrices decide the size of int4's groups.
        dtype: of what is not quantised, and of the arithmetic; "auto" is the checkpoint's.
        keep: modules that are not quantised, by their names here or the official ones.

    Raises:
        ValueError: another name; its library is not installed; weights that are quantised already.
    """
    if weights not in WEIGHTS:
        raise ValueError(
            f"weights is {weights!r}; expected one of {', '.join(WEIGHTS)}, or None for the data"
            " type of dtype."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"weights is {weights!r}, but config.json says that the checkpoint's are quantised"
            " already. Leave weights out, or give the checkpoint it was made of."
        )
    library, keep = WEIGHTS[weights], modules_here([keep] if isinstance(keep, str) else keep)
    check_dtype({"dtype": dtype})
    dtype = _dtype(dtype, config.dtype)
    try:
        importlib.import_module(library)  # now, and not within a simulation
    except ImportError as error:
        raise ValueError(
            f"weights={weights!r} needs {library}, which is not installed or cannot be imported"
            f" ({error}). In a clone run: .venv/bin/python -m pip install -e '.[quantise]'"
        ) from error
    if weights == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=keep,
        )
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    if weights == "int8":
        _check_int8(dtype)
        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=keep)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(deepcopy(config))
    rows = [module.in_features for _, module in _taken(model, keep)]
    group = next((size for size in GROUPS if not any(row % size for row in rows)), GROUPS[0])
    # The other formats need a library of Meta's besides.
    int4 = Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d")
    return TorchAoConfig(int4, modules_to_not_convert=keep)


def lines_of(quantiser) -> tuple[str, str]:
    """Lines of Python that import what ``quantiser_for`` made one of, and what makes it again."""
    if isinstance(quantiser, BitsAndBytesConfig):
        names = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
        given = _arguments(quantiser, *names, "bnb_4bit_compute_dtype", "llm_int8_skip_modules")
        return "from transformers import BitsAndBytesConfig", f"BitsAndBytesConfig({given})"
    kind, keep = quantiser.quant_type, _arguments(quantiser, "modules_to_not_convert")
    name, given = type(kind).__name__, ""
    if name == "Int4WeightOnlyConfig":
        given = _arguments(kind, "group_size", "int4_packing_format")
    imports = f"from torchao.quantization import {name}\nfrom transformers import TorchAoConfig"
    return imports, f"TorchAoConfig({name}({given}), {keep})"


def _arguments(made, *names: str) -> str:
    values = {name: getattr(made, name) for name in names}
    values = {name: getattr(value, "value", value) for name, value in values.items()}
    return ", ".join(
        f"{name}={value if isinstance(value, torch.dtype) else repr(value)}"
        for name, value in values.items()
    )


def _dtype(given, own) -> torch.dtype:
    """What ``dtype`` of ``from_pretrained`` stands for; the checkpoint's own where it is "auto"."""
    given = own or torch.float32 if given in (None, "auto") else given
    return getattr(torch, str(given).removeprefix("torch."))


def _check_int8(dtype: torch.dtype, what: str = "dtype is float16"):
    if dtype == torch.float16:
        raise ValueError(
            f"{what}, but torchao's int8 sums whole numbers up to 127 before it scales"
            " them, and the sums pass float16's largest number, 65,504: answers would be wrong"
            " without a word. Give dtype=torch.bfloat16, or use nf4."
        )


def check_autocast(model: nn.Module):
    """ValueError for products of int8 weights under ``torch.autocast`` in float16."""
    for device in ("cuda", "cpu"):  # offloaded weights are on neither
        if not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) != _HALF:
            continue
        if any(type(weight).__name__ == "Int8Tensor" for weight in model.parameters()):
            _check_int8(_HALF, "autocast computes in float16")


def check_conversion(model: nn.Module, convert):
    """Refuse to give a model with quantised weights another data type.

    ``convert`` is what ``nn.Module._apply`` calls on every tensor. Packed numbers and scales stay
    as they are, so that half of the model would change, and int8 would leave float16's range.
    """
    quantised = _quantised(model)
    own, made = model.dtype, convert(torch.empty(0, dtype=model.dtype)).dtype
    if quantised and made != own:
        raise ValueError(
            f"The model cannot be converted from {own} to {made}: {len(quantised)} of its weights"
            f" are quantised, first {quantised[0]!r}, and stay as they are. Load the original in"
            f" that type, by load(..., weights=..., dtype={made}) or from_pretrained."
        )


def _quantised(model: nn.Module) -> list[str]:
    """The names of weights that are quantised."""
    marks = ("tensor_data_names", "quant_state", "SCB")  # of torchao, of 4 bits, of LLM.int8
    weights = model.named_parameters()
    return [name for name, weight in weights if any(hasattr(weight, mark) for mark in marks)]


def check_quantised(model: nn.Module):
    """ValueError for a model that bitsandbytes or torchao was to quantise, and left as it was."""
    config = model.hf_quantizer.quantization_config
    if config.quant_method in ("bitsandbytes", "torchao") and not _quantised(model):
        raise ValueError(
            f"{type(config).__name__} has quantised none of the weights: all are among those to be"
            " left, or on the CPU with llm_int8_enable_fp32_cpu_offload. Leave fewer, or load"
            " without it."
        )


def check_stored(stored, dtype, own):
    """Refuse to load a checkpoint that was saved quantised where, or as, it cannot answer.

    ``stored`` is the ``quantization_config`` in its config.json, ``own`` the data type there.

    Raises:
        ValueError: int4 without its card; int8 in float16; of bitsandbytes in another data type.
    """
    kind, dtype, own = str(stored), _dtype(dtype, own), _dtype(None, own)
    if "Int4WeightOnlyConfig" in kind:
        check_int4_card()
    elif "Int8WeightOnlyConfig" in kind:
        _check_int8(dtype)
    elif "bitsandbytes" in kind and dtype != own:
        # Its reader casts biases alone, so that the next product has two types.
        raise ValueError(
            f"dtype is {dtype}, but the checkpoint was quantised and saved in {own}, and what is"
            f" left of that cannot change. Give dtype={own}, or quantise the original in {dtype}."
        )


def check_quantiser(config, dtype, meta_model: nn.Module):
    """Put names that the model's modules have in the skip list of a quantiser's configuration, an
    object of transformers or a dictionary, and refuse what it would pass over or fail at.

    Raises:
        ValueError: a name that no module has; rows that int4's groups do not divide; int4 without
            a GPU that has its kernels, or in another data type than theirs; int8 in float16.
    """
    fields = config if isinstance(config, dict) else vars(config)
    skipped = None
    for field in _SKIP_FIELDS:
        if given := fields.get(field):
            given = [given] if isinstance(given, str) else given
            fields[field] = skipped = modules_here(given)
            names = [name for name, _ in meta_model.named_modules()]
            for name in given:
                if all(should_convert_module(each, modules_here([name])) for each in names):
                    raise ValueError(
                        f"{field} names {name!r}, which no module of the model is called, so it"
                        " would be quantised all the same. Name it as here (lm_head, vision_tower,"
                        " language_model.layers.0) or officially (output_layer, vision)."
                    )
    if isinstance(config, BitsAndBytesConfig) or fields.get("quant_method") == "bitsandbytes":
        _check_bitsandbytes(BitsAndBytesConfig.from_dict(fields) if config is fields else config)
    int4, dtype = fields.get("quant_type"), _dtype(dtype, meta_model.config.dtype)
    if type(int4).__name__ == "FqnToConfig":
        _check_by_name(int4.fqn_to_config, meta_model)
    if type(int4).__name__ == "Int8WeightOnlyConfig":
        _check_int8(dtype)
    if type(int4).__name__ != "Int4WeightOnlyConfig":
        return
    check_int4_card()
    if int4.int4_packing_format != "tile_packed_to_4d":
        if importlib.util.find_spec("mslk") is None:
            raise ValueError(
                f"int4_packing_format {int4.int4_packing_format.value!r} needs the library mslk,"
                ' which is not installed. Give Int4WeightOnlyConfig "tile_packed_to_4d".'
            )
    elif dtype != torch.bfloat16:
        raise ValueError(
            f"dtype is {dtype}, but the kernels of int4 multiply bfloat16 only. Give"
            " dtype=torch.bfloat16, or use nf4."
        )
    skipped = ["lm_head"] if skipped is None else skipped  # transformers' own default
    left = [name for name, one in _taken(meta_model, skipped) if one.in_features % int4.group_size]
    if left:
        raise ValueError(
            f"group_size is {int4.group_size}, which does not divide the rows of {len(left)}"
            f" matrices, first {left[0]!r}; torchao would leave them as they are without a word."
            f" Give a smaller one of {', '.join(map(str, GROUPS))}, or name them in"
            " modules_to_not_convert."
        )


def _check_bitsandbytes(config: BitsAndBytesConfig):
    if not config.load_in_4bit and not config.load_in_8bit:
        raise ValueError(
            "The configuration of bitsandbytes has neither load_in_4bit nor load_in_8bit, and 4"
            " bits would be taken without a word. Set one of them to True."
        )
    if config.load_in_4bit and config.bnb_4bit_quant_type not in ("fp4", "nf4"):
        raise ValueError(
            f"bnb_4bit_quant_type is {config.bnb_4bit_quant_type!r}; expected 'nf4' or 'fp4'."
        )


def _check_by_name(kinds: dict, meta_model: nn.Module):
    """Put names that the model's modules have in torchao's table of what becomes of which."""
    if "_default" in kinds:
        raise ValueError(
            'FqnToConfig has a "_default", by which biases are quantised too, and no answer comes.'
            " Give TorchAoConfig that configuration itself, with modules_to_not_convert."
        )
    names = {name for name, _ in (*meta_model.named_modules(), *meta_model.named_parameters())}
    for name in list(kinds):
        found = [name] if name.startswith("re:") else modules_here([name])
        for one in found:
            pattern = one.removeprefix("re:") if one.startswith("re:") else re.escape(one)
            if not any(re.fullmatch(pattern, each) for each in names):
                raise ValueError(
                    f"FqnToConfig names {name!r}, which no module of the model is called, so it"
                    " would be left as it is. Name it as here or officially, from its first part."
                )
        kind = kinds.pop(name)
        kinds.update(dict.fromkeys(found, kind))


def check_int4_card():
    """ValueError where there is no GPU that has the kernels of int4."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else ()
    if capability < _INT4_CAPABILITY:
        raise ValueError(
            "int4 needs a GPU of compute capability 8.0 (Ampere) or newer, whose kernels torchao"
            f" calls; here is {'.'.join(map(str, capability)) or 'none'}. Use nf4, which runs"
            " everywhere, or int8."
        )


def _taken(model: nn.Module, keep: list[str]):
    """The matrices that a quantiser takes, with their names."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear and should_convert_module(name, keep):
            yield name, module


def prepare_saving(model, options: dict):
    """Choose the layout in ``options`` of ``save_pretrained`` for a model that may be quantised.

    Raises:
        ValueError: its weights would not load again from safetensors.
    """
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is None:
        packed = [
            name for name, one in model.named_parameters() if hasattr(one, "tensor_data_names")
        ]
        if packed:
            raise ValueError(
                f"{len(packed)} weights were quantised after loading, first {packed[0]!r}: the"
                " official layout has no room for them. Quantise while loading, by"
                " load(..., weights=...) or quantization_config=, and save that."
            )
        return
    if options.get("save_original_format"):
        raise ValueError(
            "save_original_format=True, but quantised queries, keys and values cannot be fused as"
            " the official layout has them. Leave it out; the names here are saved and load again."
        )
    if any(hasattr(one, "SCB") and one.is_floating_point() for one in model.parameters()):
        raise ValueError(
            "The weights are kept in full by llm_int8_has_fp16_weight=True, and would not load"
            " again. Save the original, or load it without that."
        )
    options["save_original_format"] = False
    try:
        quantiser.get_state_dict_and_metadata(model)
        model.config.from_dict(model.config.to_dict())  # as a reload does
    except ValueError as error:
        raise ValueError(
            f"Nothing was saved: {error} Weights that load again are those of bitsandbytes, and of"
            " torchao's Int8WeightOnlyConfig and Int4WeightOnlyConfig."
        ) from error


def unpack(model: nn.Module):
    """Give bitsandbytes' 4 bits the layout back that everything but answering reads.

    On processors with AVX-512 for bfloat16 the library turns weights and scales once a model in
    evaluation mode has answered on the CPU, and rounds scales to bfloat16. What then merges,
    dequantises or trains takes them for what they were, without a word.
    """
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            scales = state.absmax
            module.state_dict()  # the library's own way back, which leaves plain scales turned
            if not state.nested:
                state.absmax = scales.T.reshape(-1).float()


def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a weight is kept in: itself, or packed numbers and their scales."""
    names = getattr(tensor, "tensor_data_names", None)  # of torchao
    if names is not None:
        names = [*names, *getattr(tensor, "optional_tensor_data_names", ())]
        return [part for name in names if (part := getattr(tensor, name, None)) is not None]
    state, others = getattr(tensor, "quant_state", None), [getattr(tensor, "SCB", None)]
    if state is not None:  # of bitsandbytes, as SCB
        others += [state.absmax, state.code, state.offset]
        others += [state.state2.absmax, state.state2.code] if state.nested else []
    return [tensor, *(part for part in others if isinstance(part, torch.Tensor))]
