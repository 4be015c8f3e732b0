"""What the autograd engine does in place with real tensors, and with fake ones does not."""

from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor

_ATEN = torch.ops.aten
# Private functions; without them gradients are added into new tensors, as fake ones do.
_COUNTS = hasattr(torch.Tensor, "_use_count") and hasattr(torch._C, "_storage_Use_Count")
# ``_use_count()`` of a gradient that only the engine refers to; found by trying.
_engines_own: int | None = None


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
    """A backward pass in which two gradients are added that nothing else refers to."""

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
