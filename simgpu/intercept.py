"""What ``torch`` is while a simulated rig is active: "cuda" names its cards, in every thread."""

from contextlib import ExitStack, contextmanager
from functools import partial, partialmethod
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.optim import optimizer
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from simgpu import streams
from simgpu.attention import attention, linear, rms_norm
from simgpu.device import (
    DEVICE_TYPE,
    as_card,
    backward_error,
    cuda_taken_over,
    current,
    fake_mode,
    on_card,
)
from simgpu.recurrent import KINDS, flatten_parameters, recurrent
from simgpu.runtime import Runtime

# Taken here and not when a block begins: the machine itself may be simulated, in tests.
_ROUTES = {
    "scaled_dot_product_attention": (attention, functional.scaled_dot_product_attention),
    "rms_norm": (rms_norm, functional.rms_norm),
    "linear": (linear, functional.linear),
}
_DATA = torch.Tensor.data
_MAKE_FROM_DATA = ("tensor", "as_tensor", "asarray")


@contextmanager
def simulated_torch(rig):
    """Let torch see ``rig``'s cards as CUDA devices until the block ends."""
    fake_mode()
    torch.utils._device._device_constructors()  # which it remembers, as they are when first asked
    runtime = Runtime(rig)
    with ExitStack() as stack:
        stack.enter_context(cuda_taken_over())

        def replace(owner, name, value, **options):
            stack.enter_context(mock.patch.object(owner, name, value, **options))

        replace(current, "index", 0)

        for name, function in runtime.functions().items():
            replace(torch._C, name, function, create=True)
        for name, value in runtime.names().items():
            replace(torch.cuda, name, value, create=True)
        for name in streams.NAMES:
            replace(torch.cuda, name, getattr(streams, name))
        replace(torch, "Generator", streams.Generator)
        replace(torch, "load", partial(_load, torch.load))
        # Above these PyTorch looks for a guard of the CUDA device before it makes a tensor.
        replace(torch.Tensor, "to", partialmethod(_to, torch.Tensor.to))
        replace(torch.Tensor, "cuda", _cuda)
        for name in _MAKE_FROM_DATA:
            replace(torch, name, partial(_from_data, getattr(torch, name)))
        replace(torch.Tensor, "new_tensor", partialmethod(_from_data_of, torch.Tensor.new_tensor))
        replace(torch.Tensor, "pin_memory", streams.pin_memory)
        replace(torch.Tensor, "is_pinned", streams.is_pinned)
        for name, (route, original) in _ROUTES.items():
            replace(functional, name, partial(route, rig, original))
        for kind in KINDS:
            original = getattr(torch._VF, kind)
            replace(torch._VF, kind, partial(recurrent, rig, kind, original), create=True)
        replace(torch.nn.RNNBase, "flatten_parameters", flatten_parameters)
        # Optimisers update many tensors at a time only for types of tensor on this list.
        types = [*optimizer._foreach_supported_types, FakeTensor]
        replace(optimizer, "_foreach_supported_types", types)
        replace(torch.autocast, "__init__", partialmethod(_autocast, torch.autocast.__init__))
        engine = partial(_backward, rig, torch.autograd.graph._engine_run_backward)
        replace(torch.autograd, "_engine_run_backward", engine)
        replace(torch.autograd.graph, "_engine_run_backward", engine)
        # A module that moves to a card keeps its parameters, as with CUDA: ties and optimizers too.
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        torch.__future__.set_swap_module_params_on_conversion(True)
        replace(torch.Tensor, "data", property(_DATA.__get__, _set_data), create=True)
        # torch's autograd would start a thread per card, and knows of one simulated card only.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield


def _autocast(self, original, device_type, dtype=None, enabled=True, cache_enabled=None):
    """On simulated cards torch's autocast would do nothing, without a word."""
    if enabled and device_type in ("cuda", DEVICE_TYPE):
        raise NotImplementedError(
            "autocast is not simulated: the weights would be computed in their own type and the"
            " bytes would be wrong. Load the model in the type you want (dtype=torch.bfloat16), or"
            " use autocast on a real device."
        )
    original(self, device_type, dtype, enabled, cache_enabled)


def _set_data(self, value: torch.Tensor):
    """``parameter.data = tensor``, also where one has numbers and the other has none."""
    if isinstance(value, FakeTensor) and not isinstance(self, FakeTensor):
        if isinstance(self, torch.nn.Parameter):
            value = torch.nn.Parameter(value, self.requires_grad)
        torch.utils.swap_tensors(self, value)
    else:
        _DATA.__set__(self, value)


def _to(self, original, *args, **kwargs):
    if "device" in kwargs:
        kwargs["device"] = as_card(kwargs["device"])
    return original(self, *map(as_card, args), **kwargs)


def _cuda(self, device=None, non_blocking=False, memory_format=torch.preserve_format):
    device = (
        "cuda"
        if device is None
        else torch.device("cuda", device)
        if isinstance(device, int)
        else device
    )
    return self.to(device, non_blocking=non_blocking, memory_format=memory_format)


def _from_data(original, data, *args, device=None, **kwargs):
    if device is None and not isinstance(data, torch.Tensor):
        modes = reversed(_get_current_function_mode_stack())  # which would put it in below this
        device = next((mode.device for mode in modes if isinstance(mode, DeviceContext)), None)
    return original(data, *args, device=as_card(device), **kwargs)


def _from_data_of(self, original, *args, device=None, **kwargs):
    device = self.device if device is None and on_card(self) else device
    return original(self, *args, device=as_card(device), **kwargs)


def _backward(rig, original, *args, **kwargs):
    try:
        with rig.backward_pass():
            return original(*args, **kwargs)
    except SystemError as error:
        raise backward_error(error) from None


def _load(original, file, map_location=None, **kwargs):
    """``torch.load``; what goes to a card is read on the CPU and moved there."""
    places = {}

    def note(storage, location):
        wanted = map_location
        if isinstance(wanted, dict):
            wanted = wanted.get(location, location)
        elif callable(wanted):
            return wanted(storage, location)
        places[storage.data_ptr()] = torch.device(location if wanted is None else wanted)
        return storage

    def move(leaf):
        is_tensor = isinstance(leaf, torch.Tensor)
        place = places.get(leaf.untyped_storage().data_ptr()) if is_tensor else None
        return leaf if place is None else leaf.to(place)

    return torch.utils._pytree.tree_map(move, original(file, map_location=note, **kwargs))
