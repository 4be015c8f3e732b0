"""Triton's kernels on simulated cards: a launch computes nothing and takes no memory.

Neither compiler nor driver is needed for that, nor Triton: where it is not installed, ``triton``
and ``language`` here let kernels be defined, for simulated cards alone.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch

from simgpu.device import on_card
from simgpu.replacing import instead_of

try:
    import triton
    import triton.language as language
    from triton.runtime.errors import OutOfResources
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction
except ImportError:

    class JITFunction:
        """A kernel that nothing but simulated cards can launch."""

        def __init__(self, function: Callable):
            self.__name__ = function.__name__

        def __getitem__(self, grid) -> Callable:
            return lambda *args, **options: self.run(*args, grid=grid, warmup=False, **options)

        def run(self, *args, grid, warmup, **options):
            raise RuntimeError(
                f"{self.__name__} is a kernel of Triton, which is not installed here. Expected"
                " tensors on simulated cards. Install triton, on Linux with a GPU."
            )

    class OutOfResources(Exception):
        """Nothing is too large where nothing is launched."""

    triton = SimpleNamespace(jit=JITFunction, __version__="not installed")
    language = SimpleNamespace(constexpr=lambda value: value)
    InterpretedFunction = None


def launching(tensor: torch.Tensor) -> str:
    """How a kernel is launched on a tensor: "compiled", "interpreted" (on a CPU, by Triton), or ""
    where Triton is not installed. On simulated cards it is as on real ones."""
    if on_card(tensor):
        return "compiled"
    if InterpretedFunction is None:
        return ""
    return "interpreted" if interpreting() else "compiled"


def interpreting() -> bool:
    """Whether kernels that are defined now are for Triton's interpreter."""
    return InterpretedFunction is not None and bool(triton.knobs.runtime.interpret)


def replacements(rig) -> list[tuple[object, str, object]]:
    """Owner, name and value of what is replaced while a rig is active."""

    def run(original, kernel, *args, grid, warmup, **options):
        tensors = [each for each in (*args, *options.values()) if isinstance(each, torch.Tensor)]
        if not any(map(on_card, tensors)):
            return original(kernel, *args, grid=grid, warmup=warmup, **options)
        places = {str(each.device): None for each in tensors}
        if len(places) > 1:
            raise ValueError(
                f"Pointer argument cannot be accessed from Triton: {kernel.__name__} is launched on"
                f" tensors on {' and '.join(places)}. Expected all on one card: move them there."
            )
        (place,), current = places, torch.cuda.current_device()
        if place != f"cuda:{current}":
            raise ValueError(
                f"{kernel.__name__} is launched on cuda:{current}, the current card, and its"
                f" tensors are on {place}: without access between the cards it would fail, else"
                " run before they are ready. Expected the card of the tensors. Launch it inside"
                f' torch.cuda.device("{place}").'
            )
        if not warmup:
            rig.numbers.lose(tensors)  # any of them may be written

    kinds = filter(None, (JITFunction, InterpretedFunction))
    return [(kind, "run", instead_of(kind.run, run)) for kind in kinds]
