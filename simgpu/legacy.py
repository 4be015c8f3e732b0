"""``torch.cuda.FloatTensor`` and its kind: old names for making, moving and testing tensors."""

import torch

from simgpu.device import on_card

TYPES = {"Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16"}
TYPES |= {"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"}
TYPES |= {"Bool": "bool"}


class _Legacy(type):
    """A type of tensors on a card, of one data type."""

    def __instancecheck__(cls, tensor):
        return isinstance(tensor, torch.Tensor) and on_card(tensor) and tensor.dtype is cls.dtype

    def __call__(cls, *arguments, device="cuda"):
        if len(arguments) == 1 and not isinstance(arguments[0], int | torch.Size):
            return torch.tensor(arguments[0], dtype=cls.dtype, device=device)
        return torch.empty(*arguments, dtype=cls.dtype, device=device)


def names() -> dict:
    """What they are in ``torch.cuda`` while a rig is active."""
    return {
        f"{name}Tensor": _Legacy(f"{name}Tensor", (), {"dtype": getattr(torch, dtype)})
        for name, dtype in TYPES.items()
    }


def to_type(original, self, dtype=None, non_blocking: bool = False, **options):
    """``Tensor.type``, which names such a type, or moves and converts to one."""
    if dtype is None:
        name = original(self)
        return f"torch.cuda.{name.rpartition('.')[2]}" if on_card(self) else name
    if isinstance(dtype, str) and dtype.startswith("torch.cuda."):
        dtype = getattr(torch.cuda, dtype.rpartition(".")[2])
    if isinstance(dtype, _Legacy):
        return self.to("cuda", dtype.dtype, non_blocking)
    return original(self, dtype, non_blocking, **options)
