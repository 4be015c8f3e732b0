"""A PyTorch device that has shapes, types and bytes but no numbers, and that is called "cuda".

PyTorch lets one extra backend (PrivateUse1) be defined from Python. Here its tensors are fake
tensors: every operator runs its shape rules and no arithmetic. Two kernels are enough, since all
factory functions and copies to a device start by making an empty tensor; everything after that
dispatches on the fake tensor itself.

PyTorch refuses to name such a backend "cuda". So it has another name inside PyTorch and while an
operator runs, and everybody else is told "cuda:N" by a tensor's ``device``; what is made on "cuda"
arrives at the same two kernels, in every thread.

The registration function is experimental in PyTorch; all that depends on it is in this module.

Once there is such a backend, PyTorch takes a bare number (``tensor.to(0)``, as accelerate's hooks
write it) for a device of it, also on a machine with GPUs and also when no simulated card is in use.
So outside the ``with`` block of a simulated rig the two kernels make a tensor on the GPU of that
number. (Libraries that compare devices still find that ``torch.device(0)`` is not the GPU a tensor
is on; ``loading`` helps the two that do.)
"""

import threading
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import torch
from torch._subclasses.fake_tensor import (
    _DISPATCH_META_HANDLERS,
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)

try:
    from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError
except ImportError:  # torch 2.11 has no error of its own for this
    FakeTensorDeviceMismatchError = ()
from torch.utils import _pytree, backend_registration

from simgpu import convolution, rules
from simgpu.catalog import MAX_CARDS
from simgpu.engine import IN_PLACE, Guard, explain_real_failures, try_engine
from simgpu.fake import QuickFakeMode
from simgpu.numbers import Numbers, keep, may_know, refuse_lost

_BUILT_WITH_CUDA = hasattr(torch._C, "_cuda_getDeviceCount")
# Without a name of its own it leaves PyTorch's engine to CUDA for as long as can be (``engine``).
DEVICE_TYPE = "privateuseone" if _BUILT_WITH_CUDA else "simcuda"
# Called after every operator with its overload, its results on cards and CPU, and its arguments.
Observer = Callable[[object, list[FakeTensor], tuple, dict], None]
_observer: Observer | None = None
_numbers: Numbers | None = None
_ATEN, _DEVICE = torch.ops.aten, torch.ops.prim.device.default


class _BackendModule(backend_registration._DummyBackendModule):
    """What torch asks of ``torch.simcuda``."""

    def device_count(self) -> int:
        return MAX_CARDS

    def is_available(self) -> bool:
        return _observer is not None

    # Without this, gradient checkpointing fails inside a C++ hook and aborts the process.
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class _ObservedFakeMode(QuickFakeMode):
    """Runs shape rules and reports each operator, of the autograd engine's threads as well."""

    def dispatch(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            rules.refuse_compiled(func)
        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": as_card(kwargs["device"])}
        if func in rules.VIEWS and isinstance(args[0], FakeTensor) and args[0].constant is None:
            view = self.placed(self.on_meta(func, args, kwargs), args[0].fake_device)
            if args[0].known is not None:
                keep(func, args, kwargs, view)
            return view
        if func in rules.REWRITTEN and isinstance(args[0], FakeTensor):
            with self:
                output = rules.REWRITTEN[func](*args, **kwargs)
            if output is not NotImplemented:
                return output
        if self.is_running:  # an operator that a shape rule uses is not the program's own
            return self._by_shape_rule(func, types, args, kwargs)
        refuse_lost(func, args, kwargs)
        if func is _ATEN.copy_.default and not isinstance(args[1], FakeTensor):
            # The rule remembers its arguments weakly, and torch cannot move a parameter that
            # something refers to weakly.
            is_weight = args[1].requires_grad
            args = (args[0], args[1].detach(), *args[2:])
            if is_weight:
                return self._run(func, types, args, kwargs)
        if _numbers is not None and (_numbers.captures or may_know(func, args)):
            return _numbers.dispatch(self._run, func, types, args, kwargs)
        return self._run(func, types, args, kwargs)

    def _run(self, func, types, args: tuple, kwargs: dict):
        """An operator of the program: its shape rule, and the observer is told."""
        if func in IN_PLACE and IN_PLACE[func](*args):
            if _observer is not None:
                _observer(func, [args[0]], args, kwargs)
            return args[0]
        self._nesting.depth = 1
        try:
            output = self._by_shape_rule(func, types, args, kwargs)
        finally:
            self._nesting.depth = 0
        if _observer is not None and (results := _tensors_made(output)):
            try:
                _observer(func, results, args, kwargs)
            except torch.OutOfMemoryError as error:
                # A real card never made this tensor: no frame of the error may lead to it.
                output = results = None
                raise error.with_traceback(None) from None
        return output

    def make_empty(self, operator, *args, device, **kwargs) -> FakeTensor:
        """A new tensor, in the kernel in which PyTorch asks the device for it."""
        made = self.on_meta(operator, args, kwargs | {"device": "meta"})
        made = FakeTensor(self, made, as_card(device))
        if not self.is_running:
            try:
                _observer(operator, [made], args, kwargs)
            except torch.OutOfMemoryError as error:
                made = None
                raise error.with_traceback(None) from None
        return made

    def _by_shape_rule(self, *call):
        func, _, args, kwargs = call
        if func in rules.PRODUCTS:
            rules.check_product(args)
        if (found := self.looked_up(func, args, kwargs)) is not None:
            return found
        if func is _ATEN.copy_.default and args[0].shape == args[1].shape:
            return args[0]
        try:
            output = super().dispatch(*call)
            if func is _ATEN.convolution.default and (strides := convolution.strides(args, output)):
                options = {"dtype": output.dtype, "device": "meta"}
                relaid = torch.empty_strided(output.shape, strides, **options)
                output = FakeTensor(self, relaid, output.fake_device)
            return output
        except FakeTensorDeviceMismatchError as error:
            raise RuntimeError(str(error).replace(DEVICE_TYPE, "cuda")) from None
        except (NotImplementedError, UnsupportedOperatorException):
            return rules.by_example(self, func, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise RuntimeError(
                f"{error.func} needs the numbers in a tensor, and tensors on simulated cards have"
                " none, only shapes, types and bytes. Leave out what reads or prints values here"
                " (.item(), .tolist(), `if` on a tensor, indexing by a mask), let them be assumed"
                ' and counted (Rig.simulated(..., assume="count")), or run this on a real device.'
            ) from None


def _tensors_made(output) -> list[FakeTensor]:
    """What an operator gave that is on a card or on the CPU."""
    leaves = [output] if isinstance(output, FakeTensor) else _pytree.tree_leaves(output)
    made = [each for each in leaves if isinstance(each, FakeTensor) and each.device.type != "meta"]
    if any(each.layout is not torch.strided or each.is_quantized for each in made):
        raise RuntimeError(rules.NOT_DENSE)
    return made


_mode: _ObservedFakeMode | None = None
_goes_back = False  # whether the engine is ready for it
_registering = threading.RLock()
_libraries: list[torch.library.Library] = []  # what is registered lives as long as these
_PYTHON_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.Python)
_PYTHON_KEYS |= torch._C.DispatchKeySet(torch._C.DispatchKey.PythonTLSSnapshot)
_EMPTY = (_ATEN.empty.memory_format, _ATEN.empty_strided.default)
_INSIDE = FakeTensor.device  # what PyTorch's rules see


def fake_mode() -> FakeTensorMode:
    """The mode of all simulated tensors of this process; registers the device on first use."""
    global _mode
    with _registering:
        if _mode is None:
            name = None if _BUILT_WITH_CUDA else DEVICE_TYPE
            backend_registration._setup_privateuseone_for_python_backend(
                name, backend_module=_BackendModule(), device_guard=Guard()
            )
            library = torch.library.Library("aten", "IMPL")
            # PyTorch without CUDA has no kernels of these for it.
            for key in ("PrivateUse1", *(["CUDA"] if not _BUILT_WITH_CUDA else [])):
                for operator in _EMPTY:
                    library.impl(operator, partial(_make_empty, operator), key)
            # Without kernels of their own these are taken apart; CUDA has them. Fake tensors stop
            # the operator before it gets as far.
            for name in ("silu_backward", "_fused_rms_norm", "_fused_rms_norm_backward"):
                library.impl(name, _never_called, "PrivateUse1")
            for name, rule in rules.SOFTMAX.items():
                library.impl(name, rule, "AutogradPrivateUse1")
            # ``torch.tensor`` and lists among indices run these with Python's dispatch off.
            for operator in (_ATEN.copy_.default, _ATEN._local_scalar_dense.default):
                kernel = partial(_in_fake_mode, operator)
                library.impl(operator._schema.name.removeprefix("aten::"), kernel, "PrivateUse1")
            _libraries.append(library)
            FakeTensor.device = property(_shown_device, _INSIDE.fset)
            FakeTensor.__torch_dispatch__ = classmethod(
                partial(_dispatched, FakeTensor.__torch_dispatch__.__func__)
            )
            FakeTensor.is_cuda = property(on_card)
            FakeTensor.known = None  # by default, of ``numbers``
            _mode = _ObservedFakeMode()
            if _BUILT_WITH_CUDA:
                explain_real_failures()
            else:
                prepare_backward()
    return _mode


@contextmanager
def cuda_taken_over():
    """Until the block ends, what is made on "cuda" arrives here also where PyTorch has CUDA."""
    if not _BUILT_WITH_CUDA:  # where it always does
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.init()  # PyTorch would take it for done, when "cuda" is first named inside
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kernels that are replaced
        for operator in _EMPTY:
            kernel = partial(_make_empty, operator)
            library.impl(operator, kernel, "CUDA", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def prepare_backward():
    """To be called before a backward pass on simulated cards."""
    global _goes_back
    if not _goes_back:
        _goes_back, before = True, observe(None)
        try:
            try_engine(_mode, DEVICE_TYPE)
        finally:
            observe(*before)


def _never_called(*arguments):
    raise NotImplementedError("simulated cards do not compute")


def observe(observer: Observer | None, numbers: Numbers | None = None) -> tuple:
    """Report every operator to ``observer`` from now on, or to none, and let ``numbers`` carry
    those of small tensors; returns the two from before."""
    global _observer, _numbers
    fake_mode()
    before = _observer, _numbers
    _observer, _numbers = observer, numbers
    return before


class _Current(threading.local):
    """The card that "cuda" without a number names, and the stream that is set on each card; every
    thread has its own, as with CUDA."""

    def __init__(self):
        self.index, self.streams = 0, {}


current = _Current()


def on_card(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on a simulated card."""
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == DEVICE_TYPE


def as_card(place):
    """The simulated card that a ``torch.device`` or a name of one stands for, if it is "cuda" and a
    rig is active; anything else as it is."""
    if _observer is None or not isinstance(place, torch.device | str):
        return place
    if isinstance(place, str):
        if place.partition(":")[0] != "cuda":
            return place
        place = torch.device(place)
    if place.type != "cuda":
        return place
    return torch.device(DEVICE_TYPE, current.index if place.index is None else place.index)


def _shown_device(tensor: FakeTensor) -> torch.device:
    place = _INSIDE.fget(tensor)
    if place.type != DEVICE_TYPE or _mode.is_running:
        return place
    return torch.device("cuda", place.index)


def _dispatched(original, cls, func, types, args=(), kwargs=None):
    """Where operators on fake tensors arrive. The original would enter our mode only to arrive in
    ``dispatch`` by a way through PyTorch that takes as long as the rest."""
    if (
        args
        and type(args[0]) is FakeTensor
        and args[0].fake_mode is _mode
        and func is not _DEVICE
        and func not in _DISPATCH_META_HANDLERS
        and all(each is FakeTensor for each in types)
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None
    ):
        return _mode.dispatch(func, types, args, kwargs)
    return original(cls, func, types, args, kwargs or {})


def check_ordinal(index: int, count: int):
    """Refuse a card that is none of ``count``, as CUDA does."""
    if not 0 <= index < count:
        raise RuntimeError(
            f"CUDA error: invalid device ordinal (asked for cuda:{index}, there are {count}"
            " simulated cards). Use a lower index, or make the rig with a larger count."
        )


def machine_device(index: int) -> torch.device | None:
    """What a bare number means outside a simulated rig: a GPU where there are some, or None."""
    return torch.device("cuda", index) if _observer is None and torch.cuda.is_available() else None


def _make_empty(operator, *args, **kwargs):
    place = kwargs.get("device")
    if _observer is None:
        real = machine_device(getattr(place, "index", None) or 0)
        if real is None:
            torch.cuda.init()  # which refuses in PyTorch's words
        return operator(*args, **{**kwargs, "device": real})
    return _mode.make_empty(operator, *args, **kwargs)


def _in_fake_mode(operator, *args, **kwargs):
    """Run an operator by its shape rule, also where PyTorch has switched Python's dispatch off."""
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set() - _PYTHON_KEYS
    with torch._C._ForceDispatchKeyGuard(included, excluded), _mode:
        return operator(*args, **kwargs)
