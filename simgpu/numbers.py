"""Numbers of small tensors on simulated cards.

Token ids, positions, masks, image grids and the lengths of sequences decide which shapes a program
makes; weights and activations do not. So a small tensor keeps its numbers, in a real tensor on the
CPU beside it, if they follow from the program's own small tensors alone; an operator on such
tensors is computed there as well. What asks for numbers, as ``.item()`` or an index by a mask, then
works where they are known, and is refused where they are not.
"""

import functools
import math
from collections import Counter
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree

# Most elements of a tensor that keeps its numbers: of whole numbers and truth values, of others.
WHOLE, OTHERS = 2**23, 2**14
_ATEN = torch.ops.aten
_ITEM = _ATEN._local_scalar_dense.default
# What makes numbers of none, and so knows them.
_FACTORIES = {
    f"aten::{name}"
    for name in ("arange", "eye", "full", "linspace", "ones", "scalar_tensor", "zeros")
} | {"aten::randint", "aten::randperm", "aten::tril_indices", "aten::triu_indices"}
# The shape of the result depends on numbers.
_SHAPED_BY_NUMBERS = {
    f"aten::{name}"
    for name in ("bincount", "masked_select", "nonzero", "repeat_interleave", "unique_consecutive")
} | {"aten::_unique2", "aten::unique_dim"}
# All of the tensor is written, whatever it was before.
_OVERWRITING = {"aten::copy_", "aten::fill_", "aten::random_", "aten::zero_"}
# Nothing is said of what a model computes, even where zeros go in and the numbers would be known.
_PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot")}
_CHOOSING = {"aten::argmax", "aten::multinomial"}
# Needs of its first argument only the shape and the type; the number that it fills in.
_LIKE = {f"aten::{kind}_like": each for kind, each in (("zeros", 0), ("ones", 1), ("full", None))}
_LIKE |= {f"aten::new_{kind}": each for kind, each in (("zeros", 0), ("ones", 1), ("full", None))}
_COMPARING = {_ATEN.equal.default, _ATEN.allclose.default}  # and answers yes or no
# Writes means and variances into its fourth and fifth argument, though its schema does not say so.
_TRACKING = {"aten::native_batch_norm", "aten::cudnn_batch_norm"}
# Looks for gradients that are not finite, for GradScaler: assumed is that there are none.
_FINITE = {"aten::_amp_foreach_non_finite_check_and_unscale_"}
# Of these ``isfinite`` is made: a number that is itself, and whose size is not infinite.
_SAME = {"aten::eq": True, "aten::ne": False}
_ASKING = {"aten::equal", "aten::allclose", "aten::index"} | set(_SAME)
_ALWAYS_ASKING = _FACTORIES | _SHAPED_BY_NUMBERS | _OVERWRITING | _CHOOSING | _FINITE | _TRACKING
_ALWAYS_ASKING |= _ASKING | set(_LIKE)


class Known:
    """The numbers of one tensor; views of a storage share ``storage``, a list with one truth."""

    __slots__ = ("numbers", "storage")

    def __init__(self, numbers: torch.Tensor, storage: list[bool] | None = None):
        self.numbers, self.storage = numbers, storage or [True]


def is_small(tensor: torch.Tensor) -> bool:
    is_whole = not (tensor.is_floating_point() or tensor.is_complex())
    return tensor.numel() <= (WHOLE if is_whole else OTHERS)


def numbers_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """A tensor's numbers on the CPU; None where they are not known, or are a weight's."""
    if isinstance(tensor, FakeTensor):
        known = tensor.known
        return known.numbers if known is not None and known.storage[0] else None
    is_plain = type(tensor) is torch.Tensor and tensor.device.type == "cpu"
    return tensor if is_plain and not tensor.requires_grad and is_small(tensor) else None


def keep(func, args: tuple, kwargs: dict, output):
    """The results of an operator know their numbers, if its arguments do."""
    made = [each for each in _leaves(output) if isinstance(each, FakeTensor)]
    if not made or not all(map(is_small, made)):
        return
    storage = None
    if any(each.alias_info is not None for each in func._schema.returns):
        known = getattr(args[0], "known", None)
        storage = known.storage if known is not None else None
    if (storage is None or storage[0]) and (real := _compute(func, args, kwargs)) is not None:
        for tensor, numbers in zip(made, _leaves(real), strict=True):
            if tensor.shape == numbers.shape:
                tensor.known = Known(numbers, storage)


@functools.cache
def _asks(func) -> bool:
    """Whether an operator may know, or need, numbers whatever its first tensor is."""
    name = func._schema.name
    return name in _ALWAYS_ASKING or func is _ITEM or func._overloadname.endswith("out")


def may_know(func, args: tuple) -> bool:
    """Whether numbers may be known to an operator, or asked for; quick, and most often False."""
    first = args[0] if args else None
    if isinstance(first, list | tuple) and first:
        first = first[0]
    if isinstance(first, FakeTensor):
        if func._schema.is_mutable:
            return any(_is_known(each) for each in args) or _asks(func)
        return first.known is not None or _asks(func)
    return isinstance(first, torch.Tensor) or _asks(func)


def _is_known(each) -> bool:
    if isinstance(each, list | tuple):
        return any(map(_is_known, each))
    return isinstance(each, FakeTensor) and each.known is not None


@functools.cache
def _written(func) -> tuple[list[int], list[str]]:
    """Places and names of the arguments that an operator writes into."""
    arguments = func._schema.arguments
    written = [each.alias_info is not None and each.alias_info.is_write for each in arguments]
    places = [place for place, is_written in enumerate(written) if is_written]
    return places, [arguments[place].name for place in places]


def refuse_lost(func, args: tuple, kwargs: dict):
    """Refuse to write what has no numbers into a tensor that has some, and to copy from nothing."""
    if func is _ATEN.copy_.default or func is _ATEN._to_copy.default:
        source = args[-1] if func is _ATEN.copy_.default and len(args) == 2 else args[0]
        if source.device.type == "meta" and (args[0] is not source or "device" in kwargs):
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")
    places, names = _written(func)
    for place, name in zip(places, names, strict=True):
        written = args[place] if place < len(args) else kwargs.get(name)
        for tensor in written if isinstance(written, list | tuple) else [written]:
            if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu":
                raise RuntimeError(
                    f"{func._schema.name.removeprefix('aten::')} would write a result without"
                    " numbers into a tensor on the CPU that has some: tensors on simulated cards"
                    " have only shapes, types and bytes. Keep both on the card, or run this on a"
                    " real device."
                )


class Assumptions:
    """What is answered where a number is not known.

    ``token`` is what is chosen where a program chooses among scores, or None to leave it unknown;
    ``made`` counts the assumptions by operator.
    """

    def __init__(self):
        self.token: int | None = None
        self.made: Counter[str] = Counter()

    @contextmanager
    def choosing(self, token: int):
        """Inside the block a program that looks for the best score finds this one."""
        before, self.token = self.token, token
        try:
            yield
        finally:
            self.token = before


class Numbers:
    """Carries numbers through operators; ``dispatch`` is a fake mode's, by the shape rule.

    ``capture`` is of the CUDA graph that is captured at the moment, or None.
    """

    def __init__(self, assume: str = "refuse"):
        if assume not in ("refuse", "count"):
            raise ValueError(f'assume is {assume!r}; expected "refuse" or "count".')
        self.assume, self.assumptions = assume, Assumptions()
        self.capture = None

    @property
    def captures(self) -> bool:
        """Whether what this thread does is captured, and not done."""
        return self.capture is not None and self.capture.is_here

    def dispatch(self, by_rule, func, types, args: tuple, kwargs: dict):
        """An operator's result, with its numbers if they are known."""
        name = func._schema.name
        if self.captures:
            self.capture.check(func, args, kwargs)
        if func is _ITEM:
            known = numbers_of(args[0])
            if known is not None:
                return known.item()
            if self.assume == "count":
                self.note("item")
                return _ASSUMED[args[0].dtype] if args[0].dtype in _ASSUMED else 1
        if name == "aten::index" and any(map(_is_mask, args[1])):
            args = (args[0], self._places(by_rule, args[1]), *args[2:])
        leaves = [each for each in _leaves(args, kwargs) if isinstance(each, torch.Tensor)]
        values = [numbers_of(each) for each in leaves]
        is_known = all(value is not None for value in values) and (leaves or name in _FACTORIES)
        is_known = is_known and name not in _PRODUCTS
        if name in _SHAPED_BY_NUMBERS and is_known:
            return self._shaped_by_numbers(by_rule, func, args, kwargs)
        if func in _COMPARING and is_known:
            return _compute(func, args, kwargs)
        if self.assume == "count":
            if func in _COMPARING:
                self.note(name)
                return False
            if name in _AT_MOST and isinstance(args[0], FakeTensor):
                self.note(name)
                return _AT_MOST[name](by_rule, *args)
            if name in _SAME and not is_known and _asks_whether_finite(*args):
                output = by_rule(func, types, args, kwargs)
                self.note("isfinite")
                return self._answer(output, _SAME[name] == (args[1] is args[0]))
        if func._schema.is_mutable:
            return self._write(by_rule, func, types, args, kwargs)
        output = by_rule(func, types, args, kwargs)
        if name in _TRACKING:
            _forget(args[3:5])
        if self.captures:
            is_known = False
        if is_known:
            keep(func, args, kwargs, output)
        elif name in _LIKE and not self.captures:
            number = args[-1] if _LIKE[name] is None else _LIKE[name]
            keep(_ATEN.full.default, (output.shape, number), {"dtype": output.dtype}, output)
        elif name in _CHOOSING and self.assumptions.token is not None:
            self._choose(name, output)
        return output

    def note(self, name: str):
        """Count an assumption."""
        self.assumptions.made[name.removeprefix("aten::")] += 1

    def lose(self, tensors: list):
        """Nothing is known of these any more: what nobody looks into may write them."""
        if self.captures:
            self.capture.writes(tensors)
        _forget(tensors)

    def _write(self, by_rule, func, types, args, kwargs):
        """An operator that writes into tensors: their numbers are what it writes, or unknown."""
        arguments = func._schema.arguments
        given = dict(zip((each.name for each in arguments), args, strict=False)) | kwargs
        is_out = {each.name for each in arguments if each.alias_info and each.alias_info.is_write}
        written = _leaves([given.get(name) for name in is_out])
        written = [each for each in written if isinstance(each, FakeTensor)]
        others = [each for name, each in given.items() if name not in is_out]
        overwrites = "out" in is_out or func._schema.name in _OVERWRITING
        tensors = [each for each in _leaves(others) if isinstance(each, torch.Tensor)]
        is_known = all(numbers_of(each) is not None for each in tensors)
        output = by_rule(func, types, args, kwargs)
        if func._schema.name in _FINITE:  # it writes only what it finds, and finds nothing
            self.note(func._schema.name)
            return output
        if func._schema.name in _CHOOSING and not is_known and self.assumptions.token is not None:
            self._choose(func._schema.name, output)
            return output
        if self.captures:
            self.capture.writes(written)
            return output
        for target in written:
            known = target.known
            if is_known and overwrites and (known is None or not known.storage[0]):
                is_whole = target.nbytes == target.untyped_storage().nbytes()
                if is_whole and is_small(target):
                    real = torch.empty(target.shape, dtype=target.dtype)
                    known = target.known = Known(real, known and known.storage)
                    known.storage[0] = True
        if any(numbers_of(each) is not None for each in written) and (
            not is_known or _compute(func, args, kwargs) is None
        ):
            _forget(written)
        return output

    def _answer(self, output, answer: bool):
        if is_small(output):
            output.known = Known(torch.full(output.shape, answer))
        return output

    def _choose(self, name: str, output):
        for tensor in _leaves(output):
            if isinstance(tensor, FakeTensor) and is_small(tensor):
                tensor.known = Known(torch.full(tensor.shape, self.assumptions.token))
                self.note(name)
                if self.captures:
                    self.capture.chooses(name)

    def _places(self, by_rule, indices):
        """Indices with the places of a mask instead of the mask, where it is known."""
        found = []
        for index in indices:
            if _is_mask(index) and not isinstance(index, FakeTensor):
                found += index.nonzero().unbind(1)  # on the host, as PyTorch finds them there
                continue
            if not _is_mask(index) or (numbers_of(index) is None and self.assume == "refuse"):
                found.append(index)
                continue
            if numbers_of(index) is None:
                self.note("index")
                where = _all_places(by_rule, index)
            else:
                where = self._shaped_by_numbers(by_rule, _ATEN.nonzero.default, (index,), {})
            with torch.no_grad():
                found += [_ATEN.select.int(where, 1, dim) for dim in range(index.ndim)]
        return found

    def _shaped_by_numbers(self, by_rule, func, args, kwargs):
        device = next(each.fake_device for each in _leaves(args) if isinstance(each, FakeTensor))

        def make(real):
            if not isinstance(real, torch.Tensor):
                return real
            options = {"dtype": real.dtype, "device": device}
            made = by_rule(_ATEN.empty.memory_format, (), (list(real.shape),), options)
            made.known = Known(real)
            return made

        return _pytree.tree_map(make, _compute(func, args, kwargs))


def _asks_whether_finite(tensor, other) -> bool:
    return other is tensor or (isinstance(other, float) and math.isinf(other))


def _all_places(by_rule, tensor, *_):
    """What ``nonzero`` gives where nothing is zero."""
    sizes = [tensor.numel(), tensor.ndim]
    return _made(by_rule, tensor, sizes, torch.int64)


def _all_of_them(by_rule, tensor, *_):
    return _made(by_rule, tensor, [tensor.numel()], tensor.dtype)


def _made(by_rule, like, sizes: list[int], dtype: torch.dtype):
    options = {"dtype": dtype, "device": like.fake_device}
    return by_rule(_ATEN.empty.memory_format, (), (sizes,), options)


# What is assumed where it is not known, if it may be: truth is False (``if isnan(loss).any()``),
# other numbers are 0 (a found infinity, for a GradScaler) or 1 (a count that may be divided by);
# a result that numbers decide the length of is as long as it can be.
_ASSUMED = {torch.bool: False} | dict.fromkeys(
    (torch.float32, torch.float16, torch.bfloat16, torch.float64), 0.0
)
_AT_MOST = {"aten::nonzero": _all_places, "aten::masked_select": _all_of_them}
# Of what is assumed that by which results have the length they have.
LENGTHS = {"index", "nonzero", "masked_select"}


def _forget(tensors):
    for each in tensors:
        if isinstance(each, FakeTensor) and each.known is not None:
            each.known.storage[0] = False


def _leaves(*trees) -> list:
    return _pytree.tree_leaves(trees)


def _is_mask(index) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def _compute(func, args, kwargs):
    """An operator's result on the numbers of its arguments; None where PyTorch has none."""

    def real(each):
        if isinstance(each, torch.Tensor):
            return numbers_of(each)
        return torch.device("cpu") if isinstance(each, torch.device) else each

    args, kwargs = _pytree.tree_map(real, (args, kwargs))
    try:
        with torch.no_grad():
            return func(*args, **kwargs)
    except (RuntimeError, NotImplementedError, IndexError, TypeError):
        return None
