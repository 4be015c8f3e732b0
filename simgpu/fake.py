"""Fake tensors at a fraction of the time: what PyTorch asks anew of each tensor is known here.

In a simulated run of a model, making fake tensors takes longer than anything else. Here a tensor is
made of the attributes that are the same of all, and the results of common operators are looked up.
"""

import itertools
import threading

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from simgpu import rules


class _Nesting(threading.local):
    """Where a thread is: how deep in operators, and whether in a shape rule."""

    depth, in_kernel = 0, False


class QuickFakeMode(FakeTensorMode):
    """A ``FakeTensorMode`` of which a process has one, for any number of threads."""

    # Some constructors would otherwise touch the device with a real kernel.
    avoid_device_init = True

    def __init__(self):
        self._nesting = _Nesting()
        self._lengths = itertools.count()  # of nested tensors
        self._results: dict[tuple, tuple] = {}  # of operators, by their arguments
        super().__init__(allow_non_fake_inputs=True, allow_fallback_kernels=False)
        # What is the same of every fake tensor.
        like = FakeTensor(self, torch.empty(0, device="meta"), torch.device("cpu"))
        self._attributes = dict(vars(like))
        # A property hides it in torch 2.13; in 2.11 it is the attribute itself.
        names = ("_fake_device", "fake_device")
        self._place = next(name for name in names if name in self._attributes)

    def __deepcopy__(self, memo):
        # A copied tensor belongs to the same mode.
        return self

    @property
    def in_kernel_invocation(self) -> bool:
        """Whether a shape rule runs, in which tensors say that they are meta: in this thread."""
        return self._nesting.in_kernel

    @in_kernel_invocation.setter
    def in_kernel_invocation(self, value: bool):
        self._nesting.in_kernel = value

    @property
    def is_running(self) -> bool:
        """Whether this thread is inside an operator."""
        return self._nesting.depth > 0

    def create_symbolic_nested_int(self, *, nt_tensor_id=None):
        """Names the unequal lengths in a nested tensor, here without symbols."""
        return torch._C._get_nested_int(next(self._lengths), 1)

    def on_meta(self, func, args: tuple, kwargs: dict) -> torch.Tensor:
        """An operator's result by its shape rule, of the meta device; what PyTorch's
        ``in_kernel_invocation_manager`` is for."""
        nesting = self._nesting
        before = nesting.in_kernel
        with torch._C._DisableTorchDispatch(), torch._C._PreserveDispatchKeyGuard():
            nesting.in_kernel = True
            torch._C._set_meta_in_tls_dispatch_include(True)
            try:
                return func(*args, **kwargs)
            finally:
                nesting.in_kernel = before

    def placed(self, made: torch.Tensor, device: torch.device) -> FakeTensor:
        """A tensor of the meta device as one of ``device``, which has its number; what
        ``FakeTensor(mode, made, device)`` is."""
        tensor = torch.Tensor._make_subclass(
            FakeTensor,
            made,
            made.requires_grad,
            dispatch_device=True,
            device_for_backend_keys=device,
        )
        torch._C._set_warn_deprecated_on_mutable_data_ptr(tensor)
        attributes = vars(tensor)
        attributes.update(self._attributes)
        attributes[self._place] = device
        return tensor

    def looked_up(self, func, args: tuple, kwargs: dict) -> FakeTensor | None:
        """The result of one of the operators in ``rules.PLAIN``, or of a copy; None where PyTorch's
        own rule has to say it."""
        if func in rules.PLAIN:
            device = rules.common_card(args)
        elif func is rules.TO_COPY:
            device = rules.copied_to(args, kwargs)
            kwargs = {name: value for name, value in kwargs.items() if name != "device"}
        else:
            return None
        if device is None:
            return None
        key = (func, rules.described(args), *kwargs.items())
        if key not in self._results:
            made = self.on_meta(func, args, kwargs)
            self._results[key] = (made.shape, made.stride(), made.dtype)
        shape, stride, dtype = self._results[key]
        made = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        return self.placed(made, device)
