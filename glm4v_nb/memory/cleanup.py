"""Giving memory back after an error."""

import gc
import traceback

import torch


def clear_frames(error: BaseException | None):
    """Let go of everything the frames of an error hold, and of those it came from.

    The local variables of a failed forward pass are its tensors, and they live as long as the error does. The
    text of the traceback stays.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        for frame, _ in traceback.walk_tb(error.__traceback__):
            # Before Python 3.13 a frame whose locals were once looked at, by IPython's own traceback for one, keeps
            # a copy of them; looking again brings it up to date, that is, empties it.
            _ = frame.f_locals
        error = error.__cause__ or error.__context__


def empty_caches():
    """Collect garbage, then hand PyTorch's cached memory back to the driver."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
