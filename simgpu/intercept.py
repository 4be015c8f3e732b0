"""What ``torch`` is while a simulated rig is active: "cuda" names its cards, in every thread."""

import warnings
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.optim import optimizer
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from simgpu import autocast, kernels, legacy, readout, streams
from simgpu.attention import attention
from simgpu.composites import linear, rms_norm
from simgpu.device import as_card, cuda_taken_over, current, fake_mode, on_card, prepare_backward
from simgpu.engine import backward_error
from simgpu.recurrent import KINDS, flatten_parameters, recurrent
from simgpu.replacing import instead_of, refusing
from simgpu.rules import NOT_DENSE
from simgpu.runtime import Runtime

# Taken here and not when a block begins: the machine itself may be simulated, in tests.
_ROUTES = {
    name: (autocast.casting(name, route), getattr(functional, name))
    for name, route in (
        ("scaled_dot_product_attention", attention),
        ("linear", linear),
        ("rms_norm", rms_norm),
    )
}
_DATA = torch.Tensor.data
_OUTSIDE = "do it outside the `with` block, on the CPU, or use a real device."
# What makes tensors of other layouts, though a nested one may be a dense one within.
_NOT_ALWAYS_DENSE = [
    *(
        (torch, f"sparse_{kind}_tensor")
        for kind in ("coo", "csr", "csc", "bsr", "bsc", "compressed")
    ),
    (torch.nested, "nested_tensor"),
    (torch.nested, "as_nested_tensor"),
]
_SENSOR = "there is no such sensor; leave it out here."
# Owner, name, and what to do instead.
_NOT_SIMULATED = [
    (torch.export, "export", f"it needs tensors of PyTorch's own; {_OUTSIDE}"),
    (torch.jit, "trace", f"it compares numbers that are not there; {_OUTSIDE}"),
    *((torch.cuda, name, _SENSOR) for name in ("utilization", "temperature", "power_draw")),
    *((torch.cuda, name, _SENSOR) for name in ("clock_rate", "memory_usage")),
    (torch.cuda, "list_gpu_processes", "there are no others; leave it out here."),
    (torch.cuda, "MemPool", "its memory is the program's own; run the function without it."),
    (torch.cuda, "make_graphed_callables", f"capture a graph yourself; or {_OUTSIDE}"),
]
_PINNABLE = ("empty", "zeros", "ones", "full", "empty_like")
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
            builtin = torch.jit._builtins._find_builtin(getattr(owner, name, None))
            stack.enter_context(mock.patch.object(owner, name, value, **options))
            if builtin:  # so that it is in scripts, too
                table = torch.jit._builtins._get_builtin_table()
                stack.enter_context(mock.patch.dict(table, {id(value): builtin}))

        replace(current, "index", 0)
        replace(current, "streams", {})
        replace(torch.cuda.graph, "default_capture_stream", None)

        for name, function in runtime.functions().items():
            replace(torch._C, name, function, create=True)
        asked = torch._C._cuda_isCurrentStreamCapturing
        replace(torch.cuda.graphs, "_cuda_isCurrentStreamCapturing", asked)
        for name, value in runtime.names().items():
            replace(torch.cuda, name, value, create=True)
        for name in streams.NAMES:
            replace(torch.cuda, name, getattr(streams, name))
        replace(torch, "Generator", streams.Generator)
        replace(torch, "load", instead_of(torch.load, _load))
        # Above these PyTorch looks for a guard of the CUDA device before it makes a tensor.
        replace(torch.Tensor, "to", instead_of(torch.Tensor.to, _to))
        replace(torch.Tensor, "cuda", _cuda)
        replace(torch.Tensor, "type", instead_of(torch.Tensor.type, legacy.to_type))
        for name, kind in legacy.names().items():
            replace(torch.cuda, name, kind)
        for owner, name in _NOT_ALWAYS_DENSE:
            replace(owner, name, instead_of(getattr(owner, name), _dense_only))
        replace(torch.cuda.nvtx, "_nvtx", streams.NVTX)
        for name in _PINNABLE:
            replace(torch, name, instead_of(getattr(torch, name), streams.pinnable))
        for name in _MAKE_FROM_DATA:
            replace(torch, name, instead_of(getattr(torch, name), _from_data))
        of_tensor = instead_of(torch.Tensor.new_tensor, _from_data_of)
        replace(torch.Tensor, "new_tensor", of_tensor)
        replace(torch.Tensor, "pin_memory", streams.pin_memory)
        replace(torch.Tensor, "is_pinned", streams.is_pinned)
        for owner, name, value in [*readout.replacements(), *kernels.replacements(rig)]:
            replace(owner, name, value, create=True)
        for name, (route, original) in _ROUTES.items():
            replace(functional, name, instead_of(original, partial(route, rig)))
        for kind in KINDS:
            original = getattr(torch._VF, kind)
            replace(torch._VF, kind, partial(recurrent, rig, kind, original), create=True)
        replace(torch.nn.RNNBase, "flatten_parameters", flatten_parameters)
        # Optimisers update many tensors at a time only for types of tensor on this list.
        types = [*optimizer._foreach_supported_types, FakeTensor]
        replace(optimizer, "_foreach_supported_types", types)
        for name, function in autocast.names().items():
            replace(torch, name, function)
        for owner, name, reason in _NOT_SIMULATED:
            full_name = f"{owner.__name__}.{name}"
            replace(owner, name, refusing(full_name, reason))
        replace(torch, "compile", instead_of(torch.compile, _compile))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(autocast.as_it_is())
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


def _compile(original, *args, **kwargs):
    warnings.warn(
        "On simulated cards torch.compile runs the model as it is: a compiled one can take less"
        " memory for activations, and more with CUDA graphs.",
        stacklevel=3,
    )
    return original(*args, **kwargs)


def _set_data(self, value: torch.Tensor):
    """``parameter.data = tensor``, also where one has numbers and the other has none."""
    if isinstance(value, FakeTensor) and not isinstance(self, FakeTensor):
        if isinstance(self, torch.nn.Parameter):
            value = torch.nn.Parameter(value, self.requires_grad)
        torch.utils.swap_tensors(self, value)
    else:
        _DATA.__set__(self, value)


def _dense_only(original, *args, **kwargs):
    place = kwargs.get("device")
    given = torch.utils._pytree.tree_leaves((args, kwargs))
    is_here = as_card(place) != place or any(map(on_card, given))
    if is_here and kwargs.get("layout") is not torch.jagged:
        raise RuntimeError(NOT_DENSE)
    return original(*args, **kwargs)


def _to(original, self, *args, **kwargs):
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


def _from_data_of(original, self, *args, device=None, **kwargs):
    device = self.device if device is None and on_card(self) else device
    return original(self, *args, device=as_card(device), **kwargs)


def _backward(rig, original, *args, **kwargs):
    prepare_backward()
    try:
        with rig.backward_pass():
            return original(*args, **kwargs)
    except SystemError as error:
        raise backward_error(error) from None


class _Moved:
    """A storage for a function that says where it is to go; ``cuda()`` gives the place."""

    def __init__(self, storage):
        self._storage = storage

    def cuda(self, device=None, non_blocking: bool = False) -> torch.device:
        return torch.device("cuda", current.index if device is None else device)

    def __getattr__(self, name):
        return getattr(self._storage, name)


def _load(original, file, map_location=None, **kwargs):
    """``torch.load``; what goes to a card is read on the CPU and moved there."""
    places = {}

    def note(storage, location):
        wanted = map_location
        if isinstance(wanted, dict):
            wanted = wanted.get(location, location)
        elif callable(wanted):
            wanted = wanted(_Moved(storage), location)
            if not isinstance(wanted, torch.device):
                return wanted
        places[storage.data_ptr()] = torch.device(location if wanted is None else wanted)
        return storage

    def move(leaf):
        is_tensor = isinstance(leaf, torch.Tensor)
        place = places.get(leaf.untyped_storage().data_ptr()) if is_tensor else None
        return leaf if place is None else leaf.to(place)

    return torch.utils._pytree.tree_map(move, original(file, map_location=note, **kwargs))
