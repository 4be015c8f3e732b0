"""``torch.autocast("cuda")`` on simulated cards: which operators cast, and the casts that it keeps.

PyTorch has the casting in C++, for tensors of CUDA alone; for a device made in Python it has none.
The lists of operators are read in the header of the PyTorch that is installed
(ATen/autocast_mode.h), as they differ between versions; the policies, and the cache of weights'
casts, are those of aten/src/ATen/autocast_mode.{h,cpp}.
"""

import functools
import re
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

from simgpu.device import DEVICE_TYPE, fake_mode, on_card
from simgpu.replacing import instead_of

_HEADER = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
_ATEN = torch.ops.aten
_KEY = "AutocastPrivateUse1"
_KEYS = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _KEY))
_casts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by id of a weight: it, and its cast


def names() -> dict:
    """What replaces functions of ``torch`` while a rig is active: "cuda" sets both devices."""
    _register()
    return {
        "set_autocast_enabled": instead_of(torch.set_autocast_enabled, _set_enabled),
        "set_autocast_dtype": instead_of(torch.set_autocast_dtype, _set_dtype),
        "set_autocast_gpu_dtype": lambda dtype: torch.set_autocast_dtype("cuda", dtype),
        "clear_autocast_cache": _clear,
    }


@contextmanager
def as_it_is():
    """In the block, autocast that began before it holds for simulated cards too; none after it."""
    torch.set_autocast_dtype("cuda", torch.get_autocast_dtype("cuda"))
    torch.set_autocast_enabled("cuda", torch.is_autocast_enabled("cuda"))
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled(DEVICE_TYPE, False)


def casting(name: str, function):
    """``function``, which stands for an operator, with its tensors cast as that one's are."""

    @functools.wraps(function)
    def called(rig, original, *args, **kwargs):
        if not torch.is_autocast_enabled(DEVICE_TYPE) or not (policy := _lists().get(name)):
            return function(rig, original, *args, **kwargs)
        given = policy((*args, *kwargs.values()))
        args, kwargs = given[: len(args)], dict(zip(kwargs, given[len(args) :], strict=True))
        with torch._C._ExcludeDispatchKeyGuard(_KEYS):
            return function(rig, original, *args, **kwargs)

    return called


def _set_enabled(original, *arguments):
    place, enabled = arguments if len(arguments) == 2 else ("cuda", *arguments)
    original(place, enabled)
    if place == "cuda":
        original(DEVICE_TYPE, enabled)


def _set_dtype(original, place, dtype):
    original(place, dtype)
    if place == "cuda":
        original(DEVICE_TYPE, dtype)


_CLEAR = torch.clear_autocast_cache


def _clear():
    _CLEAR()
    _casts.clear()


@functools.cache
def _lists() -> dict[str, Callable | None]:
    """How the arguments of each operator on PyTorch's lists are cast, None where a dtype is set."""
    policies = {
        "LOWER_PRECISION_FP": _lower,
        "FP32": _single,
        "PROMOTE": _widest,
        "FP32_SET_OPT_DTYPE": None,
        "DIFFERENT_REDISPATCH_SIGNATURE": None,
    }
    text, found = _HEADER.read_text(encoding="utf-8"), {}
    for name, policy in policies.items():
        macro = re.search(rf"#define AT_FORALL_{name}\(_\)(.*?)\n\n", text, re.DOTALL)[1]
        operators = re.findall(r'"([\w.]+)"', macro) or [
            ".".join(filter(None, match)) for match in re.findall(r"_\((\w+)(?:, (\w+))?\)", macro)
        ]
        found |= dict.fromkeys(operators, policy)
    return found


@functools.cache
def _register() -> tuple:
    """Put a kernel on every operator of the lists; the libraries have to be kept."""
    fake_mode()
    others = torch.library.Library("_", "IMPL", _KEY)
    others.fallback(torch.library.fallthrough_kernel)
    library = torch.library.Library("aten", "IMPL", _KEY)
    for name, policy in _lists().items():
        packet, _, overload = name.partition(".")
        function = getattr(getattr(_ATEN, packet), overload or "default")
        library.impl(name, _casting(function, policy) if policy else _typed(function))
    library.impl("binary_cross_entropy", _refuse)
    return others, library


def _casting(function, policy):
    def kernel(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(_KEYS):
            return function(*policy(args), **kwargs)

    return kernel


def _typed(function):
    """For operators that compute in float32 by their argument ``dtype``, without a cast before."""
    names = [argument.name for argument in function._schema.arguments]
    place = names.index("dtype") if "dtype" in names else None

    def kernel(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(_KEYS):
            if not _is_eligible(args[0]):
                return function(*args, **kwargs)
            if place is None:  # of ``norm``, which has overloads for it
                exponent, *dims = args[1:]
                return torch.norm(args[0], exponent, *dims, dtype=torch.float32)
            if kwargs.get("dtype") is None and all(each is None for each in args[place:]):
                args, kwargs = args[:place], kwargs | {"dtype": torch.float32}
            return function(*args, **kwargs)

    return kernel


def _refuse(*arguments):
    raise RuntimeError(
        "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast, on"
        " simulated cards as on real ones. Use binary_cross_entropy_with_logits or"
        " BCEWithLogitsLoss on what comes before the sigmoid."
    )


def _is_eligible(each) -> bool:
    is_floating = isinstance(each, torch.Tensor) and each.is_floating_point()
    return is_floating and each.dtype is not torch.float64 and on_card(each)


def _lower(args) -> list:
    return _cast_all(args, torch.get_autocast_dtype(DEVICE_TYPE))


def _single(args) -> list:
    return _cast_all(args, torch.float32)


def _widest(args) -> list:
    lists = [each if isinstance(each, list | tuple) else [each] for each in args]
    dtypes = {each.dtype for some in lists for each in some if _is_eligible(each)}
    return _single(args) if torch.float32 in dtypes else _lower(args)


def _cast_all(args, dtype) -> list:
    # From the last to the first, as PyTorch's compiler orders them: it decides what lies where.
    return [_cast(each, dtype) for each in reversed(args)][::-1]


def _cast(each, dtype: torch.dtype):
    if isinstance(each, list | tuple):
        return [_cast(part, dtype) for part in each]
    if not _is_eligible(each) or each.dtype is dtype:
        return each
    is_lower = dtype is torch.get_autocast_dtype(DEVICE_TYPE) and each.dtype is torch.float32
    is_weight = each.requires_grad and each.is_leaf and not each._is_view()
    if not (is_lower and is_weight and torch.is_autocast_cache_enabled()):
        return _ATEN.to.dtype(each, dtype)
    if id(each) not in _casts:
        _casts[id(each)] = each, _ATEN.to.dtype(each, dtype)
    return _casts[id(each)][1]
