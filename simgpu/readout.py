"""Numbers on their way out of a simulation: into NumPy, text and files.

Those that are known go there; of a tensor without numbers one sentence says what to do instead.
Prints never fail: a tensor without numbers is written as PyTorch writes one of the meta device.
"""

import safetensors.torch
import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from simgpu.device import on_card
from simgpu.numbers import numbers_of
from simgpu.replacing import instead_of

# As the version of safetensors has it, below all its functions that save.
_SAVING = next(n for n in ("_flatten_as_ptr", "_flatten") if hasattr(safetensors.torch, n))
_CALLING_PYTHON = ("apply_", "map_", "map2_")
_ADVICE = {
    "save": 'Leave the saving out here (save_strategy="no" of a Trainer)',
    "show": "Leave out what reads or prints values here",
}


def replacements() -> list[tuple[object, str, object]]:
    """Owner, name and value of what is replaced while a rig is active."""
    tensor, model = torch.Tensor, PreTrainedModel
    return [
        (tensor, "numpy", _method(tensor.numpy, _numpy)),
        (tensor, "__format__", _method(tensor.__format__, _format)),
        (tensor, "share_memory_", _method(tensor.share_memory_, lambda original, self: self)),
        *((tensor, name, _method(getattr(tensor, name), _by_python)) for name in _CALLING_PYTHON),
        (tensor, "__dlpack__", _method(tensor.__dlpack__, _dlpack)),
        (tensor, "__reduce_ex__", _method(tensor.__reduce_ex__, _reduce)),
        (FakeTensor, "__repr__", _method(FakeTensor.__repr__, _repr)),
        (safetensors.torch, _SAVING, instead_of(getattr(safetensors.torch, _SAVING), _flatten)),
        (model, "save_pretrained", instead_of(model.save_pretrained, _save_pretrained)),
    ]


def _method(original, replacement):
    """A method of tensors that is another one for those of a simulation."""

    def method(original, self, *args, **kwargs):
        if isinstance(self, FakeTensor):
            return replacement(original, self, *args, **kwargs)
        return original(self, *args, **kwargs)

    return instead_of(original, method)


def _numbers(tensor: torch.Tensor, what: str, purpose: str) -> torch.Tensor:
    numbers = numbers_of(tensor)
    if numbers is None:
        raise RuntimeError(
            f"{what} needs the numbers in a tensor of shape {tuple(tensor.shape)}, and tensors in a"
            " simulation have none, only shapes, types and bytes, but for small ones that follow"
            f" from your own. {_ADVICE[purpose]}, or run this on a real device."
        )
    return numbers


def _numpy(original, self, *, force: bool = False):
    if not force and on_card(self):
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the"
            " tensor to host memory first."
        )
    if not force and self.requires_grad:
        raise RuntimeError(
            "Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead."
        )
    return _numbers(self, ".numpy()", "show").numpy()


def _format(original, self, spec: str) -> str:
    return format(self.item(), spec) if self.ndim == 0 else object.__format__(self, spec)


def _repr(original, self, **options) -> str:
    numbers = numbers_of(self)
    if numbers is None:
        return original(self, **options).replace("FakeTensor(", "tensor(", 1)
    text = repr(numbers)
    return f"{text[:-1]}, device='{self.device}')" if on_card(self) else text


def _by_python(original, self, *args):
    raise RuntimeError(
        f"{original.__name__} calls a function on each number, and tensors in a simulation have"
        " none. Use an operator of PyTorch, or run this on a real device."
    )


def _dlpack(original, self, **options):
    return _numbers(self, "DLPack", "show").__dlpack__(**options)


def _reduce(original, self, protocol):
    numbers = _numbers(self, "Pickling or torch.save", "save")
    if on_card(self):
        numbers.untyped_storage().place = str(self.device)
    return numbers.__reduce_ex__(protocol)


# What is saved from a card says so in the file, before PyTorch says that it is on the CPU.
torch.serialization.register_package(
    5, lambda storage: getattr(storage, "place", None), lambda storage, location: None
)


def _flatten(original, tensors: dict, *more):
    def real(tensor):
        return _numbers(tensor, "Saving", "save") if isinstance(tensor, FakeTensor) else tensor

    return original({name: real(tensor) for name, tensor in tensors.items()}, *more)


def _save_pretrained(original, self, *args, **kwargs):
    for parameter in self.parameters():
        if isinstance(parameter, FakeTensor):
            _numbers(parameter, "save_pretrained()", "save")
    return original(self, *args, **kwargs)
