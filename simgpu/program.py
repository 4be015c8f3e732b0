"""Runs a user's script on simulated cards, as ``python script.py arguments`` would on real ones."""

import itertools
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from types import TracebackType
from unittest import mock

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from simgpu.rig import Rig


class _Enough(BaseException):
    """The first steps are done; no program catches it by accident."""


class Program:
    """A script to be called, again if need be: to its end, or its first steps.

    A step is one call of an optimiser's ``step``; a program that has none, as inference, runs to
    its end. A call after the first prints nothing: it is the same program on other cards.

    Args:
        path: the script.
        arguments: what stands behind it on the command line.
        steps: how many it makes.

    Attributes:
        steps_done: how many the first call has made.
        out_of_memory: what Python would print of the first out-of-memory error that ended a call.

    Raises:
        ValueError: no such file.
    """

    def __init__(self, path: str | Path, arguments: Sequence[str] = (), steps: int = 2):
        self.path, self.arguments, self.steps = Path(path), list(arguments), steps
        self.calls = self.steps_done = 0
        self.out_of_memory = ""
        if not self.path.is_file():
            raise ValueError(f"There is no script {str(path)!r}. Give the path of a Python file.")
        if steps < 1:
            raise ValueError(f"steps is {steps}; expected at least 1. Give a larger number.")

    def __call__(self):
        self.calls += 1
        done, is_first = itertools.count(1), self.calls == 1

        def stepped(optimizer, args, kwargs):
            number = next(done)
            if is_first:
                self.steps_done = number
            if number >= self.steps:
                raise _Enough

        with ExitStack() as stack:
            if not is_first:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
            stack.callback(register_optimizer_step_post_hook(stepped).remove)
            home = str(self.path.resolve().parent)
            stack.enter_context(mock.patch.object(sys, "argv", [str(self.path), *self.arguments]))
            stack.enter_context(mock.patch.object(sys, "path", [home, *sys.path[1:]]))
            try:
                runpy.run_path(str(self.path), run_name="__main__")
            except _Enough:
                pass
            except torch.OutOfMemoryError as error:
                Rig.active._forget_simulation(error)
                self.out_of_memory = self.out_of_memory or self.own_traceback(error)
                raise
            except SystemExit as end:
                if end.code not in (None, 0):
                    raise

    def own_traceback(self, error: BaseException) -> str:
        """What Python would print of the script's own error, without the frames above it."""
        place: TracebackType | None = error.__traceback__
        while place is not None and place.tb_frame.f_code.co_filename != str(self.path):
            place = place.tb_next
        return "".join(traceback.format_exception(type(error), error, place))
