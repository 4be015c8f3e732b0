"""Giving memory back after an error or a finished experiment."""

import gc
import re
import sys
import traceback
from contextlib import nullcontext
from dataclasses import dataclass, field
from inspect import currentframe

import torch
from IPython import get_ipython

from glm4v_nb.tensor_holders import TensorHolder, find_holders, tensors_in
from simgpu import CardMemory, Rig
from simgpu.units import bytes_in_words


def clear_frames(error: BaseException | None):
    """Let go of everything the frames of an error hold, and of those it came from.

    The local variables of a failed forward pass are its tensors, and they live as long as the error
    does. The text of the traceback stays.
    """
    pending, cleared = [error], set()
    while pending:
        error = pending.pop()
        if error is None or id(error) in cleared:  # a chain may lead back to itself
            continue
        cleared.add(id(error))
        traceback.clear_frames(error.__traceback__)
        for frame, _ in traceback.walk_tb(error.__traceback__):
            # Before Python 3.13 a frame whose locals were once looked at, by IPython's own
            # traceback for one, keeps a copy of them; looking again brings it up to date, that is,
            # empties it.
            _ = frame.f_locals
        # Both: ``raise X from Y`` while handling Z keeps Y as the cause and Z as the context. And
        # ``raise X(Y)`` later on, as of a worker's error, keeps Y as an argument.
        pending += [error.__cause__, error.__context__, *getattr(error, "exceptions", ())]
        pending += [given for given in error.args if isinstance(given, BaseException)]


def empty_caches():
    """Collect garbage, then hand PyTorch's cached memory back to the driver."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(repr=False)
class FreedMemory:
    """What ``free_memory`` did.

    Attributes:
        before, after: every card's memory, in bytes.
        cleared: the hiding places that were emptied, in words.
        holders: the names that still lead to tensors on cards, most bytes first.
    """

    before: list[CardMemory]
    after: list[CardMemory]
    cleared: list[str] = field(default_factory=list)
    holders: list[TensorHolder] = field(default_factory=list)

    def __repr__(self):
        lines = []
        for early, late in zip(self.before, self.after, strict=True):
            figures = (early.allocated_bytes, late.allocated_bytes)
            figures += (early.reserved_bytes, late.reserved_bytes)
            changes = "allocated {} -> {}, reserved {} -> {}".format(*map(bytes_in_words, figures))
            lines.append(f"card {late.index} ({late.card}): {changes}")
        lines.append(f"let go: {', '.join(self.cleared) or 'nothing was hidden'}")
        lines.append("still held by:" if self.holders else "still held by: no variable")
        lines += [f"  {holder}" for holder in self.holders]
        return "\n".join(lines)


def free_memory(rig=None) -> FreedMemory:
    """Give back all memory on cards that no variable holds, and name the variables that hold it.

    Lets go of the frames of errors (``sys.last_value`` and what IPython keeps beside it, and the
    error being handled, when called in an ``except`` block), of entries of the output history that
    hold tensors on cards, of reference cycles and of cached memory. Your variables stay: the report
    says which to ``del``. After it ``%debug`` has no traceback to look at.

    ``rig`` is needed for simulated cards outside of their ``with`` block.
    """
    outside = rig is not None and Rig.active is None
    with rig if outside else nullcontext():
        cards, shell = rig or Rig.here(), get_ipython()
        before = cards.memory()
        cleared = _forget_errors(shell)
        namespace, hidden = vars(sys.modules["__main__"]), {}
        if shell is not None:
            cleared += _forget_outputs(shell)
            namespace, hidden = shell.user_ns, shell.user_ns_hidden
        torch.clear_autocast_cache()
        # A workspace of cuBLAS of 8 MiB can lie in a segment of many GiB, which then cannot be
        # handed back. Builds without CUDA do not have the function; the next matrix product makes
        # the workspace anew.
        getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
        empty_caches()
        holders = find_holders(namespace, hidden, currentframe().f_back)
        return FreedMemory(before, cards.memory(), cleared, holders)


def _forget_errors(shell) -> list[str]:
    """Empty the frames of every error that Python or IPython keeps, and drop what keeps it."""
    formatter = getattr(shell, "InteractiveTB", None)
    last = getattr(shell, "last_execution_result", None)
    kept = {
        "the error being handled": sys.exc_info()[1],
        "sys.last_value": getattr(sys, "last_value", None),
        "sys.last_exc": getattr(sys, "last_exc", None),
        "InteractiveTB.evalue": getattr(formatter, "evalue", None),
        "last_execution_result.error_in_exec": getattr(last, "error_in_exec", None),
    }
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):
        vars(sys).pop(name, None)
    if formatter is not None:
        formatter.tb = formatter.etype = formatter.evalue = None
    errors = {place: error for place, error in kept.items() if error is not None}
    for error in errors.values():
        clear_frames(error)
    return _in_words(errors)


def _forget_outputs(shell) -> list[str]:
    """Drop what leads to tensors on cards from Out, _1, _2, ..., _, __, ___ and last results."""
    cleared, hook = {}, shell.displayhook
    outputs = shell.user_ns.get("_oh", {})
    for number in [number for number, value in outputs.items() if tensors_in(value)]:
        cleared[f"Out[{number}]"] = outputs.pop(number)
    # IPython remembers in user_ns_hidden which variables are its own and what their values are, and
    # its own displayhook.flush() leaves _, __ and ___ there. A variable with another value is the
    # user's.
    for name, value in list(shell.user_ns_hidden.items()):
        if re.fullmatch(r"_{1,3}|_\d+", name) and tensors_in(value):
            cleared[name] = value
            for variables in (shell.user_ns, shell.user_ns_hidden):
                if variables.get(name) is value:
                    del variables[name]
                    if not name[-1].isdigit():
                        variables[name] = ""
    for name in ("_", "__", "___"):
        if tensors_in(getattr(hook, name, None)):
            cleared[name] = getattr(hook, name)
            setattr(hook, name, "")
    for place, result in (
        ("last_execution_result", shell.last_execution_result),
        ("displayhook.exec_result", getattr(hook, "exec_result", None)),
    ):
        if result is not None and tensors_in(result.result):
            cleared[place] = result.result
            result.result = None
    return _in_words(cleared)


def _in_words(places: dict) -> list[str]:
    return [f"{place} ({type(value).__name__})" for place, value in places.items()]
