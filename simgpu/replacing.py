"""Functions that stand in for others while a rig is active."""

import functools
from collections.abc import Callable


def instead_of(original: Callable, replacement: Callable) -> Callable:
    """A function with the original's name that calls ``replacement(original, ...)``.

    Unlike a ``functools.partial`` it becomes a method when a class has it, and has what PyTorch's
    and transformers' own tools look for in a function.
    """

    @functools.wraps(original)
    def function(*args, **kwargs):
        return replacement(original, *args, **kwargs)

    del function.__wrapped__  # where PyTorch's compilers would look for its source
    return function


def refusing(name: str, reason: str) -> Callable:
    """A function that raises RuntimeError: what is not simulated, why, and what to do."""

    def function(*args, **kwargs):
        raise RuntimeError(f"{name} is not simulated: {reason}")

    return function
