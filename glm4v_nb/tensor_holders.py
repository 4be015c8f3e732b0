"""Which variables of notebooks, running functions and modules keep tensors on cards alive."""

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
from simgpu.units import bytes_in_words

# Classes, modules and fake-tensor modes lead to everything; what notebooks are run by leads to
# every variable.
_TOO_WIDE = (type, types.ModuleType, TorchDispatchMode)
_MACHINERY = "IPython ipykernel asyncio concurrent logging threading tornado traitlets zmq".split()


@dataclass(frozen=True)
class TensorHolder:
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
        sizes = [f"{bytes_in_words(self.bytes[n])} on card {n}" for n in sorted(self.bytes)]
        return f"{self.name} ({self.kind}): {', '.join(sizes)}"


def find_holders(
    namespace: dict, hidden: dict, outermost: types.FrameType | None = None
) -> list[TensorHolder]:
    """Everything with a name that keeps tensors on cards alive, most bytes first.

    ``namespace`` are the notebook's variables, ``hidden`` those among them that are not the user's
    own; functions running from ``outermost`` (default: the caller) outwards are looked at too.
    """
    unexplained = [obj for obj in gc.get_objects() if _is_card_tensor(obj)]
    found = []

    def look_at(variables, seen=None):
        nonlocal unexplained
        explained = set()
        for name, value in variables:
            tensors = tensors_in(value, seen)
            if tensors:
                found.append(TensorHolder(name, type(value).__name__, bytes_on_cards(tensors)))
                explained.update(map(_storage, tensors))
        unexplained = [tensor for tensor in unexplained if _storage(tensor) not in explained]

    if unexplained:
        look_at(
            (name, value)
            for name, value in namespace.items()
            if not (name in hidden and hidden[name] is value)
            and not issubclass(type(value), types.ModuleType)
        )
        look_at(_running_variables(outermost or inspect.currentframe().f_back, namespace))
    if unexplained:  # a look into every imported module takes a moment
        look_at(_module_variables(namespace), {})
    if unexplained:
        largest = max(unexplained, key=lambda tensor: tensor.untyped_storage().nbytes())
        count, shape = len(unexplained), tuple(largest.shape)
        name = f"{count} tensors no variable leads to, the largest {shape}"
        found.append(TensorHolder(name, "unnamed", bytes_on_cards(unexplained)))
    return sorted(found, key=lambda holder: -sum(holder.bytes.values()))


def tensors_in(value, seen: dict | None = None) -> list[torch.Tensor]:
    """All tensors on cards that an object keeps alive, through any number of objects between.

    ``seen`` (id to object) is left out, and what was walked through is added to it.
    """
    # The objects are kept while walking: a freed temporary's id would come back as another's.
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


def bytes_on_cards(tensors: list[torch.Tensor]) -> dict[int, int]:
    """Card index to bytes; views of one storage count once."""
    total = Counter()
    for tensor in {_storage(tensor): tensor for tensor in tensors}.values():
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
    if kind is dict and ("__builtins__" in obj or "__spec__" in obj):
        return []  # a module's or the notebook's variables
    if kind is types.FunctionType:  # all but its globals
        return [obj.__closure__, obj.__defaults__, obj.__kwdefaults__, obj.__dict__]
    contents = gc.get_referents(obj)
    if issubclass(kind, torch.Tensor):  # what it holds below Python
        contents.append(obj.grad if obj.is_leaf else None)
    return contents


def _running_variables(frame, namespace):
    """Variables of the functions now running, from ``frame`` outwards to the notebook's cell."""
    while frame is not None:
        code = frame.f_code
        is_function = code.co_flags & inspect.CO_OPTIMIZED
        if not is_function and frame.f_globals is namespace:
            return
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if is_function and package not in _MACHINERY:
            place = f"{code.co_name} of {Path(code.co_filename).name}:{frame.f_lineno}"
            values = dict(shown := frame.f_locals)
            if type(shown) is dict:
                # Before Python 3.13 a copy that the frame keeps, and that would keep what it holds.
                shown.clear()
            for name, value in values.items():
                yield f"{name} in {place}", value
        frame = frame.f_back


def _module_variables(namespace):
    for module_name, module in list(sys.modules.items()):
        variables = getattr(module, "__dict__", None)
        if type(variables) is dict and variables is not namespace:
            for name, value in list(variables.items()):
                if not issubclass(type(value), types.ModuleType) and gc.is_tracked(value):
                    yield f"{module_name}.{name}", value
