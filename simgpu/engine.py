"""PyTorch's autograd engine on simulated cards.

It adds gradients in place with real tensors, and with fake ones does not. And it works on streams
of one kind of device alone (``at::accelerator::getAccelerator``): of the one made from Python, once
that has a name, and else of CUDA. A name cannot be taken back. So where PyTorch has CUDA, the
device gets none until the first simulated backward pass; after it this process has no backward
pass on a real GPU.
"""

import threading
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import backend_registration

from simgpu.replacing import instead_of

_ATEN = torch.ops.aten
# Private functions; without them gradients are added into new tensors, as fake ones do.
_COUNTS = hasattr(torch.Tensor, "_use_count") and hasattr(torch._C, "_storage_Use_Count")
# ``_use_count()`` of a gradient that only the engine refers to; found by trying.
_engines_own: int | None = None


class Guard(backend_registration._DummyDeviceGuard):
    """Tells PyTorch the type of the device.

    PyTorch also asks on its way out of a backward pass in which a hook has failed, while Python's
    error is still set. An error that is set fails any call, which C++ cannot have there: the
    process would end. So the error is taken here, and ``backward_error`` gives it back.
    """

    def type_(self):
        try:
            # Not a plain call, which Python makes quick by asking for no error.
            _anything(*())
        except SystemError as error:
            _taken.error = error.__cause__
        return torch._C._autograd.DeviceType.PrivateUse1


_anything, _taken = object, threading.local()


def backward_error(error: SystemError) -> BaseException:
    """What ended a backward pass, from the error that PyTorch raised for want of it."""
    return _taken.__dict__.pop("error", None) or error


def _in_backward_pass() -> bool:
    """Whether the autograd engine runs, and records no graph of what it does."""
    return torch._C._current_graph_task_id() >= 0 and not torch.is_grad_enabled()


def _added_in_place(sum_so_far, gradient, *others) -> bool:
    """Whether the autograd engine would add this gradient in place: nothing else refers to the sum,
    and no graph of the backward pass is recorded (torch/csrc/autograd/input_buffer.cpp)."""
    return (
        isinstance(gradient, FakeTensor)
        and _is_engines_own(sum_so_far)
        and sum_so_far.shape == gradient.shape
        and sum_so_far.dtype == gradient.dtype
        and (
            sum_so_far.is_contiguous() or sum_so_far.nbytes == sum_so_far.untyped_storage().nbytes()
        )
    )


def _is_engines_own(tensor, *others) -> bool:
    """Whether only the autograd engine refers to a tensor, as to zeros that it adds rows to."""
    if not (_COUNTS and _in_backward_pass() and isinstance(tensor, FakeTensor)):
        return False
    storage = tensor.untyped_storage()
    count = torch._C._storage_Use_Count(storage._cdata)  # one is ``storage``
    return tensor._use_count() == _engines_own and count == 2


def _put_in_place(zeros, indices, gradient, accumulate=False) -> bool:
    """Whether this is an index's gradient, which PyTorch puts into new zeros in place."""
    return accumulate and isinstance(zeros, FakeTensor) and _in_backward_pass()


# By operator, whether the engine would do it in place here.
IN_PLACE = {_ATEN.add.Tensor: _added_in_place, _ATEN.index_put.default: _put_in_place}
_ADD_ROWS = (_ATEN.index_add.default, _ATEN.scatter_add.default, _ATEN.put.default)
IN_PLACE |= dict.fromkeys(_ADD_ROWS, _is_engines_own)


def try_engine(mode, device_type: str):
    """Find out what ``_engines_own`` is; PyTorch's engine works for the simulated device after it.

    Runs a backward pass in which two gradients are added that nothing else refers to.
    """
    torch._C._rename_privateuse1_backend(device_type)

    def note(sum_so_far, gradient):
        global _engines_own
        if _COUNTS and _in_backward_pass():
            _engines_own = sum_so_far._use_count()
        return False

    with mock.patch.dict(IN_PLACE, {_ATEN.add.Tensor: note}), torch.enable_grad():
        with mode:
            leaf = torch.empty(1, device=device_type, requires_grad=True)
            gradient = torch.empty(1, device=device_type)
        with torch.autograd.set_multithreading_enabled(False):
            (leaf * 2 + leaf * 3).backward(gradient)


def explain_real_failures():
    """From now on a backward pass on a real GPU that this module is to blame for says so."""
    engine = instead_of(torch.autograd.graph._engine_run_backward, _explaining)
    torch.autograd._engine_run_backward = torch.autograd.graph._engine_run_backward = engine


def _explaining(original, *args, **kwargs):
    try:
        return original(*args, **kwargs)
    except RuntimeError as error:
        if "opt_ready_stream" not in str(error):
            raise
        raise RuntimeError(
            "There was a backward pass on simulated cards in this process, and since then PyTorch's"
            " autograd engine works for those alone. Train on the real GPU in another process, or"
            " before the simulation."
        ) from error
