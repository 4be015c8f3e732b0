"""bitsandbytes' 4-bit weights on simulated cards, and the memory of its operators on CUDA.

The library makes a weight of a class of its own out of a tensor, which a tensor without numbers
cannot become. Here it stays one, with the attributes that the library's layers ask for. (torchao's
weights hold plain tensors and need no help.) Its operators bring their shape rules.

Source of what they take: backends/cuda/ops.py and functional.py of bitsandbytes 0.50.
"""

import math
from unittest import mock

import torch
from wrapt import when_imported, wrap_function_wrapper

from simgpu.device import on_card

# Rows of activations up to which the library's own kernel reads the 4 bits, and from which on it
# unpacks the weights first; between them it decides by card and shape, by tables not repeated here.
_FEW_ROWS, _MANY_ROWS, _MANY_OF_LARGE = 4, 1536, 512
_LARGE = 4 * 2**20  # numbers of a matrix
_ATTRIBUTES = ("blocksize", "compress_statistics", "quant_type", "quant_storage", "module")


def _quantise_4bit(wrapped, _, args, kwargs):
    """As transformers does while it loads; the full weight lasts until its caller lets it go."""
    weights, model = args[0], kwargs["model"]
    first = next(iter(weights.values()))
    if not on_card(first[0] if isinstance(first, list) else first):
        return wrapped(*args, **kwargs)
    from bitsandbytes import functional

    # A table that the library keeps for good, on the device where it was first wanted.
    tables, made = vars(model).setdefault("_simulated_tables", {}), {}
    for name, weight in weights.items():
        weight = weight[0] if isinstance(weight, list) else weight
        layer = model.get_submodule(name.rpartition(".")[0])
        like = vars(layer.weight)
        with mock.patch.object(functional, "name2qmap", tables):
            packed, state = functional.quantize_4bit(
                weight.contiguous(),
                blocksize=like["blocksize"],
                compress_statistics=like["compress_statistics"],
                quant_type=like["quant_type"],
                quant_storage=like["quant_storage"],
            )
        parameter = torch.nn.Parameter(packed, requires_grad=False)
        vars(parameter).update({each: like[each] for each in _ATTRIBUTES})
        parameter.quant_state, parameter.bnb_quantized = state, True
        layer.quant_state, layer._is_hf_initialized = state, True
        made[name] = parameter
    return made


def check_quantiser(config):
    """ValueError for a ``quantization_config`` that cannot be loaded on simulated cards."""
    given = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    if given.get("load_in_8bit") or given.get("_load_in_8bit"):
        raise ValueError(
            "bitsandbytes' 8 bits look among the numbers of every input for large ones, and tensors"
            " on simulated cards have no numbers. Use its 4 bits, or 8 bits of torchao."
        )


def _rows(a) -> int:
    return a["A"].numel() // a["A"].shape[-1]


def unpacks(a) -> bool | None:
    """Whether ``gemm_4bit`` with these arguments makes the weights whole; None: that depends."""
    rows, columns, size = _rows(a), a["shapeB"][1], math.prod(a["shapeB"])
    if rows <= _FEW_ROWS and columns % a["blocksize"] == 0:
        return False
    large = size >= _LARGE and rows > _MANY_OF_LARGE
    return True if rows > _MANY_ROWS or columns % a["blocksize"] or large else None


def whole_weights(a) -> list[int]:
    """What is taken then, in order: scales in two steps if they are packed as well, the weights."""
    scales = 4 * a["absmax_8bit"].numel() if a["absmax_8bit"] is not None else 0
    return [*([scales, scales] if scales else []), math.prod(a["shapeB"]) * a["A"].itemsize]


@when_imported("transformers.integrations.bitsandbytes")
def _prepare(module):
    wrap_function_wrapper(module, "Bnb4bitQuantize.convert", _quantise_4bit)
