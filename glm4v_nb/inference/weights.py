"""A decoder layer's weights as the kernels take them: of 16 bits, or torchao's of 8 and of 4.

All are the model's own, where they are; none is a copy.
"""

from dataclasses import dataclass

import torch
from torch import nn

from glm4v_nb.model.quantising import parts_of

# Classes of torchao whose numbers the kernels read as they are kept, and their bits.
_BITS = {"Int8Tensor": 8, "Int4TilePackedTo4dTensor": 4}
GROUP = 128  # columns of a row that share a scale, of 4 bits


@dataclass
class Weight:
    """The matrix of a product.

    Attributes:
        shape: rows, which are outputs, and columns.
        numbers: (rows, columns) of 16 or 8 bits; of 4 bits torchao's tiles of 8 rows and 128
            columns: int32 (rows / 8, columns / 128 rounded up to a multiple of 8, 32, 4).
        scales: of 8 bits a factor a row, float32; of 4 bits for every group and row a scale and a
            zero, two bfloat16 in an int32; of 16 bits there are none, and this is ``numbers``.
        bits: 16, 8 or 4.
    """

    shape: tuple[int, int]
    numbers: torch.Tensor
    scales: torch.Tensor
    bits: int

    @classmethod
    def of(cls, *parts: torch.Tensor) -> "Weight":
        """One matrix of the rows of several, which become one in memory.

        Raises:
            torch.OutOfMemoryError: no room for them once more, where they are not yet one.
        """
        bits = bits_of(parts[0])
        rows, columns = sum(len(part) for part in parts), parts[0].shape[1]
        if bits == 16:
            numbers = as_one(parts, "data")
            return cls((rows, columns), numbers.view(rows, columns), numbers, bits)
        numbers = as_one(parts, "qdata").view(-1, *parts[0].qdata.shape[1:])
        if bits == 8:
            return cls((rows, columns), numbers, as_one(parts, "scale"), bits)
        # All groups of one part come before those of the next.
        pairs = as_one(parts, "scale_and_zero").view(torch.int32)
        return cls((rows, columns), numbers, pairs, bits)

    @property
    def kind(self) -> str:
        """Its type in words."""
        return str(self.numbers.dtype) if self.bits == 16 else f"int{self.bits}"


@dataclass
class LayerWeights:
    """Those of one layer, whose queries, keys and values are one matrix."""

    device: torch.device
    dtype: torch.dtype  # of what the kernels read and write between the products
    input_gain: torch.Tensor
    heads: Weight  # (query, key and value rows, hidden)
    heads_bias: torch.Tensor
    out: Weight
    gain: torch.Tensor
    gate_up: Weight
    down: Weight

    @classmethod
    def of(cls, layer: nn.Module) -> "LayerWeights":
        """Those of a ``GlmDecoderLayer``; raises as ``Weight.of``."""
        attention, mlp = layer.self_attn, layer.mlp
        heads = [attention.q_proj, attention.k_proj, attention.v_proj]
        return cls(
            attention.q_proj.weight.device,
            layer.input_layernorm.weight.dtype,
            layer.input_layernorm.weight,
            Weight.of(*(each.weight for each in heads)),
            as_one([each.bias for each in heads], "data"),
            Weight.of(attention.o_proj.weight),
            layer.post_attention_layernorm.weight,
            Weight.of(mlp.gate_up_proj.weight),
            Weight.of(mlp.down_proj.weight),
        )

    def tensors(self) -> list[torch.Tensor]:
        """All that the kernels read, scales of quantised numbers among them."""
        own = [each for each in vars(self).values() if isinstance(each, torch.Tensor)]
        weights = [each for each in vars(self).values() if isinstance(each, Weight)]
        return own + [each for one in weights for each in (one.numbers, one.scales)]


def bits_of(weight: torch.Tensor) -> int | None:
    """Bits of a number, of a weight that the kernels can read; None of another."""
    parts = parts_of(weight)
    if parts[0] is weight:
        return 16 if len(parts) == 1 else None
    bits = _BITS.get(type(weight).__name__)
    whole = {8: weight.shape[-1], 4: GROUP}.get(bits)
    scaled = [getattr(weight, name, None) for name in ("act_pre_scale", "act_quant_kwargs")]
    if whole is None or list(weight.block_size) != [1, whole] or scaled != [None, None]:
        return None
    rows, columns = weight.shape
    # What the kernels take at a time; of gates and ups each 8 rows.
    return bits if columns % (512 // bits) == 0 == rows % 16 else None


def storage_of(tensor: torch.Tensor) -> int:
    """What is the same of tensors that share memory; simulated cards have no addresses."""
    return tensor.untyped_storage()._cdata


def as_one(owners, name: str) -> torch.Tensor:
    """The tensors that some objects have under a name as one, flat: the loader leaves some as parts
    of one; others become it.

    Raises:
        torch.OutOfMemoryError: no room for all once more, where they are not yet one.
    """
    parts = [getattr(owner, name) for owner in owners]
    sizes = [part.numel() for part in parts]
    starts = [part.storage_offset() for part in parts]
    ends = [start + size for start, size in zip(starts, sizes, strict=True)]
    alone = {storage_of(part) for part in parts}
    if starts[1:] == ends[:-1] and len(alone) == 1:
        return torch.as_strided(parts[0], (sum(sizes),), (1,))
    whole = torch.cat([part.flatten() for part in parts])
    for owner, part, piece in zip(owners, parts, whole.split(sizes), strict=True):
        setattr(owner, name, piece.view(part.shape))
    return whole
