"""Quantised weights in safetensors files: which tensors they are, and of what shapes."""

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from glm4v_nb.model.quantising import GROUPS


def weight_of(stored: str) -> str:
    """The weight whose numbers a stored tensor of torchao has; other names are kept."""
    module, _, name = stored.rpartition(".")
    return f"{module}.weight" if name == "_weight_qdata" else stored


class _Described(BaseModel):
    """What torchao wrote of one weight into the file's metadata, and makes of it again."""

    kind: Literal["Int8Tensor", "Int4TilePackedTo4dTensor"] = Field(alias="_type")
    data: dict = Field(alias="_data")


def check_described(path: Path, metadata: dict[str, str] | None, shapes: dict[str, list[int]]):
    """Compare what a file says of torchao's weights with their numbers, and scales in the file.

    Raises:
        ValueError: another class than these two, or groups that are not those of the scales.
    """
    for name in (name for name in shapes if weight_of(name) != name):
        try:
            found = _Described.model_validate_json((metadata or {}).get(weight_of(name), ""))
            _, group = found.data["block_size"]
            if found.kind == "Int8Tensor":
                scale, expected = name.replace("_qdata", "_scale"), [shapes[name][0], 1]
                right = group == shapes[name][1]
            else:
                rows, columns = 8 * shapes[name][0], 128 * shapes[name][1]
                scale, expected = name.replace("_qdata", "_scale_and_zero"), [columns // group]
                expected, right = [*expected, rows, 2], group in (*GROUPS, 256)
            others = [found.data.get("act_quant_kwargs"), found.data.get("reduce_range") or None]
            # Another shard may have the scales.
            if not right or shapes.get(scale, expected) != expected or others != [None, None]:
                raise ValueError("groups or scales are others")
        except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
            raise ValueError(
                f"{path}: what it says of {weight_of(name)!r} is not what torchao writes of int8"
                " and int4 weights. Quantise the original again, by load(..., weights=...)."
            ) from error


def is_stored_in_4_bits(quantiser, shape: list[int], dtype: str, expected: list[int]) -> bool:
    """Whether bitsandbytes has packed a matrix of an ``expected`` shape so, two numbers in a byte,
    as a column of its ``bnb_4bit_quant_storage``; ``dtype`` as safetensors names it."""
    fields = quantiser if isinstance(quantiser, dict) else vars(quantiser or object)
    is_packed = fields.get("bnb_4bit_quant_storage") is not None and shape[1:] == [1]
    bits = dtype.lstrip("BF")
    return is_packed and bits.isdecimal() and shape[0] * int(bits) == 4 * math.prod(expected)


def packed_shapes(shape: list[int]) -> list[list[int]]:
    """What torchao's numbers of a matrix may measure: as they are, or in tiles of four bits, eight
    in an int32, with columns filled up to 1024 (Int4TilePackedTo4dTensor)."""
    if len(shape) != 2:
        return []
    rows, columns = shape
    return [[rows, columns], [-(-rows // 8), -(-columns // 1024) * 8, 32, 4]]
