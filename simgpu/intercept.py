"""What ``torch`` is while a simulated rig is active: ``torch.cuda``, and what "cuda:0" names."""

from contextlib import ExitStack, contextmanager
from functools import partial, partialmethod
from operator import attrgetter, methodcaller
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.optim import optimizer
from torch.overrides import TorchFunctionMode

from simgpu.catalog import Card
from simgpu.device import DEVICE_TYPE, card_device, check_ordinal, fake_mode
from simgpu.operators import attention, convolution

# Taken here and not when a block begins: the machine itself may be simulated, in tests.
_ROUTES = {
    "scaled_dot_product_attention": (attention, functional.scaled_dot_product_attention),
    "conv2d": (convolution, functional.conv2d),
}


@contextmanager
def simulated_torch(rig):
    """Let torch see ``rig``'s cards as CUDA devices until the block ends."""
    fake_mode()
    cuda = CudaFunctions(rig)
    with ExitStack() as stack:

        def replace(owner, name, value):
            stack.enter_context(mock.patch.object(owner, name, value, create=True))

        for name in (name for name in dir(cuda) if not name.startswith("_")):
            replace(torch.cuda, name, getattr(cuda, name))
        replace(torch._C, "_cuda_clearCublasWorkspaces", rig.release_workspaces)
        for name, (route, original) in _ROUTES.items():
            replace(functional, name, partial(route, rig, original))
        # Optimisers update many tensors at a time only for types of tensor on this list.
        types = [*optimizer._foreach_supported_types, FakeTensor]
        replace(optimizer, "_foreach_supported_types", types)
        replace(torch.autocast, "__init__", partialmethod(_autocast, torch.autocast.__init__))
        # torch's autograd would start a thread per card, and knows of one simulated card only.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(CudaNames(cuda))
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


def _of_card(answer):
    return lambda self, device=None: answer(self._rig.cards[self._index(device)])


def _of_allocator(answer):
    return lambda self, device=None: answer(self._rig.allocators[self._index(device)])


def _properties(card: Card) -> SimpleNamespace:
    major, minor = card.compute_capability
    return SimpleNamespace(
        name=card.device_name,
        total_memory=card.total_bytes,
        major=major,
        minor=minor,
        multi_processor_count=card.multiprocessors,
    )


class CudaFunctions:
    """Stand-ins for functions of ``torch.cuda``, of the same names and meanings."""

    def __init__(self, rig):
        self._rig = rig
        self._current = 0

    def _index(self, device=None) -> int:
        if device is None:
            return self._current
        if not isinstance(device, int):
            device = torch.device(device)
            if device.type not in ("cuda", DEVICE_TYPE):
                raise ValueError(f"Expected a cuda device, but got: {device}")
            device = device.index
        index = self._current if device is None else device
        check_ordinal(index, len(self._rig.cards))
        return index

    def is_available(self):
        return True

    is_initialized = is_available

    def is_bf16_supported(self, including_emulation=True):
        return including_emulation or self._rig.card.bf16_supported

    def is_current_stream_capturing(self):
        return False

    def device_count(self):
        return len(self._rig.cards)

    def current_device(self):
        return self._current

    def set_device(self, device):
        self._current = self._index(device)

    def empty_cache(self):
        for allocator in self._rig.allocators:
            allocator.empty_cache()

    def set_per_process_memory_fraction(self, fraction, device=None):
        self._rig.allocators[self._index(device)].fraction = fraction

    synchronize = _of_card(lambda card: None)
    get_device_name = _of_card(attrgetter("device_name"))
    get_device_properties = _of_card(_properties)
    get_device_capability = _of_card(attrgetter("compute_capability"))
    mem_get_info = _of_allocator(attrgetter("free_bytes", "total_bytes"))
    memory_allocated = _of_allocator(attrgetter("allocated"))
    max_memory_allocated = _of_allocator(attrgetter("peak_allocated"))
    memory_reserved = _of_allocator(attrgetter("reserved"))
    max_memory_reserved = _of_allocator(attrgetter("peak_reserved"))
    reset_peak_memory_stats = _of_allocator(methodcaller("reset_peaks"))


class CudaNames(TorchFunctionMode):
    """Takes "cuda", "cuda:1" and ``torch.device("cuda")`` in calls for the simulated cards."""

    def __init__(self, cuda: CudaFunctions):
        super().__init__()
        self._cuda = cuda

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        if func in (torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad):
            with self._cuda._rig.backward_pass():
                return func(*args, **kwargs)
        if func is torch.Tensor.cuda:
            device = args[1] if len(args) > 1 else kwargs.get("device")
            return args[0].to(card_device(self._cuda._index(device)))
        args = tuple(self._translate(value) for value in args)
        if "device" in kwargs:
            kwargs["device"] = self._translate(kwargs["device"])
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            # These fill the new tensor below the level at which a simulated device can step in.
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)

    def _translate(self, value):
        is_place = isinstance(value, (torch.device, str))
        is_cuda = is_place and str(value).partition(":")[0] == "cuda"
        return card_device(self._cuda._index(value)) if is_cuda else value
