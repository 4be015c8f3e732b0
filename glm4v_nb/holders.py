"""Finds the names that keep tensors on cards alive: variables of a notebook, of running functions,
of modules."""

import gc
import inspect
import sys
import types
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from simgpu.device import DEVICE_TYPE

# Classes, modules and fake-tensor modes lead to everything; what notebooks are run by leads to
# every variable.
_TOO_WIDE = (type, types.ModuleType, TorchDispatchMode)
_MACHINERY = {
    "IPython",
    "ipykernel",
    "asyncio",
    "concurrent",
    "logging",
    "threading",
    "tornado",
    "traitlets",
    "zmq",
}


@dataclass(frozen=True)
class Holder:
    """A name that leads to tensors on cards.

    Attributes:
        name: of a variable in the notebook, or "a variable in a function of a file".
        kind: class of what it names.
        bytes: card index to bytes of the tensors it leads to. Two names of one tensor both have its
            bytes.
    """

    name: str
    kind: str
    bytes: dict[int, int]

    def __str__(self):
        return f"{self.name} ({self.kind}): {on_cards(self.bytes)}"


def on_cards(sizes: dict[int, int]) -> str:
    """Bytes per card in words: "12.97 GiB on card 0, 3.0 MiB on card 1"."""
    return ", ".join(f"{in_words(sizes[card])} on card {card}" for card in sorted(sizes))


def in_words(size: int) -> str:
    """Bytes with a unit: GiB with two decimals, smaller sizes with one."""
    for unit, scale, decimals in (("GiB", 2**30, 2), ("MiB", 2**20, 1), ("KiB", 2**10, 1)):
        if size >= scale:
            return f"{size / scale:.{decimals}f} {unit}"
    return f"{size} bytes"


def find_holders(
    namespace: dict, hidden: dict, outermost: types.FrameType | None = None
) -> list[Holder]:
    """Everything with a name that keeps tensors on cards alive, most bytes first.

    Args:
        namespace: the notebook's variables (or those of ``__main__``).
        hidden: variables that are in ``namespace`` but not the user's own; a name with another
            value is.
        outermost: frame to begin with; functions running below it are looked at too. Default: the
            caller's.
    """
    tensors = [obj for obj in gc.get_objects() if _is_card_tensor(obj)]
    if not tensors:
        return []
    roots = [
        (name, value)
        for name, value in namespace.items()
        if not (name in hidden and hidden[name] is value)
        and not issubclass(type(value), types.ModuleType)
    ]
    roots += _running_variables(outermost or inspect.currentframe().f_back, namespace)
    found, named = [], set()
    for name, value in roots:
        held = tensors_in(value)
        named.update(id(tensor) for tensor in held)
        found.append((name, type(value).__name__, held))
    storages = {_storage(tensor) for tensor in tensors if id(tensor) in named}
    rest = [tensor for tensor in tensors if _storage(tensor) not in storages]
    if (
        rest
    ):  # a look into every imported module takes a moment, so only when something is unexplained
        seen = {}
        for name, value in _module_variables(namespace):
            held = tensors_in(value, seen)
            found.append((name, type(value).__name__, held))
            storages.update(_storage(tensor) for tensor in held)
        rest = [tensor for tensor in rest if _storage(tensor) not in storages]
        largest = max(rest, key=lambda tensor: tensor.untyped_storage().nbytes(), default=None)
        if largest is not None:
            name = f"{len(rest)} tensors no variable leads to, the largest {tuple(largest.shape)}"
            found.append((name, "unnamed", rest))
    holders = [Holder(name, kind, sizes(held)) for name, kind, held in found if held]
    return sorted(holders, key=lambda holder: -sum(holder.bytes.values()))


def tensors_in(value, seen: dict | None = None) -> list[torch.Tensor]:
    """All tensors on cards that an object keeps alive, through any number of objects between.

    ``seen`` (id to object) is left out, and what was walked through is added to it.
    """
    # The objects themselves are kept while walking: the id of a freed temporary would come back as
    # another's.
    seen, found = {} if seen is None else seen, []
    pending = list(vars(value).values()) if issubclass(type(value), type) else [value]
    while pending:
        obj = pending.pop()
        if id(obj) in seen:
            continue
        seen[id(obj)] = obj
        if _is_card_tensor(obj):
            found.append(obj)
        pending.extend(item for item in _contents(obj) if gc.is_tracked(item))
    return found


def sizes(tensors: list[torch.Tensor]) -> dict[int, int]:
    """Card index to bytes; views of one storage count once."""
    storages = {_storage(tensor): tensor for tensor in tensors}
    total = Counter()
    for tensor in storages.values():
        total[tensor.device.index] += tensor.untyped_storage().nbytes()
    return dict(total)


def _is_card_tensor(obj) -> bool:
    # Here and below not isinstance, which asks proxies of other libraries for their __class__ and
    # wakes them.
    return issubclass(type(obj), torch.Tensor) and obj.device.type in ("cuda", DEVICE_TYPE)


def _storage(tensor) -> int:
    return tensor.untyped_storage()._cdata


def _contents(obj) -> list:
    kind = type(obj)
    if issubclass(kind, _TOO_WIDE) or kind.__module__.partition(".")[0] in _MACHINERY:
        return []
    if kind is dict and (
        "__builtins__" in obj or "__spec__" in obj
    ):  # a module's or the notebook's variables
        return []
    if kind is types.FunctionType:  # all but its globals
        return [obj.__closure__, obj.__defaults__, obj.__kwdefaults__, obj.__dict__]
    contents = gc.get_referents(obj)
    if issubclass(kind, torch.Tensor):  # what it holds below Python
        contents.append(obj.grad if obj.is_leaf else None)
    return contents


def _running_variables(frame, namespace):
    """Variables of the functions now running, from ``frame`` outwards to the notebook's cell."""
    while frame is not None and (_in_function(frame) or frame.f_globals is not namespace):
        code = frame.f_code
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _MACHINERY:
            for name, value in _locals(frame).items():
                yield (
                    f"{name} in {code.co_name} of {Path(code.co_filename).name}:{frame.f_lineno}",
                    value,
                )
        frame = frame.f_back


def _in_function(frame) -> bool:
    return frame is not None and bool(frame.f_code.co_flags & inspect.CO_OPTIMIZED)


def _locals(frame) -> dict:
    if not _in_function(frame):
        return {}  # a module's own variables
    shown = frame.f_locals
    values = dict(shown)
    if type(shown) is dict:
        # Before Python 3.13 this is a copy that the frame keeps, and that would keep what it holds.
        shown.clear()
    return values


def _module_variables(namespace):
    for module_name, module in list(sys.modules.items()):
        variables = getattr(module, "__dict__", None)
        if type(variables) is dict and variables is not namespace:
            for name, value in list(variables.items()):
                if not issubclass(type(value), types.ModuleType) and gc.is_tracked(value):
                    yield f"{module_name}.{name}", value
