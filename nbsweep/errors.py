"""What the error of a notebook says: in one line, what groups it with others of the same cause, and
where memory ran out."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
from itertools import zip_longest

from papermill.exceptions import strip_color

from .store import OutOfMemoryCause
from .words import shortened

CAUSES = "nbsweep.causes"
_OUT_OF_MEMORY = re.compile(r"[\w.]*OutOfMemoryError\b")
# How Python prints a group: its members behind bars, each below a line of dashes, which begins with
# a second plus below a group.
_MEMBER = re.compile(r"^ *\+(-\+)?-{16} (?:\d+|\.\.\.) -{16}$", re.MULTILINE)
_END = re.compile(r"^ *\+-+$", re.MULTILINE)
_BAR = re.compile(r"^ *\| ?", re.MULTILINE)
_TYPE = re.compile(r"^([A-Za-z_][\w.]*)(?:$|: )", re.MULTILINE)
_CHAINED = re.compile(r"^(?:The above exception was|During handling of the above)\b", re.MULTILINE)


def one_line(name: str, message: str) -> str:
    """An error as its type and the first line of its message that has words."""
    lines = [" ".join(line.split()) for line in strip_color(message or "").split("\n")]
    worded = filter(re.compile(r"\w").search, lines)
    line = f"{name}: {next(worded, next(filter(None, lines), ''))}".removesuffix(": ")
    return shortened(line, 1_000, "executed.ipynb")


def explain(name: str, message: str, traceback: str) -> dict:
    """What an ``Outcome`` says of an error: status, one line, signature, traceback, and the cause
    of an out-of-memory error, which one in a group is too.

    Args:
        traceback: as IPython prints it, or Python where it is an exception group.
    """
    error, traceback = one_line(name, message), strip_color(traceback)
    found = {"status": "failed", "signature": signature_of(error)}
    is_group = re.search(r"\(\d+ sub-exceptions?\)$", message)
    if leaves := group_leaves(traceback) if is_group else []:
        error = f"{error}: {'; '.join(leaves)}"
        kinds = sorted(set(map(signature_of, leaves)))
        found["signature"] = f"{name} of {'; '.join(kinds)}"
    if full := next(filter(_OUT_OF_MEMORY.match, leaves or [error]), None):
        cause = cause_of(full, traceback)
        signature = f"out of memory in {cause.phase or 'an unnamed stage'}"
        found = {"status": "oom", "oom": cause, "signature": signature}
    return found | {"error": error, "traceback": traceback}


def group_leaves(traceback: str) -> list[str]:
    """The exceptions in a group that are no groups themselves, each in one line, from the traceback
    that Python prints of it: of the first 15 at each of 10 levels, and a few words for the rest."""
    _, _, text = traceback.rpartition("Exception Group Traceback")
    _, *parts = _MEMBER.split(text)
    leaves = []
    # A group stands before a line with a second plus, which begins its own members.
    for member, deeper in zip_longest(parts[1::2], parts[2::2]):
        member = _BAR.sub("", _END.split(member)[0])
        told = _CHAINED.split(member)[-1]  # what it was caused by stands before it
        if not deeper and (found := _TYPE.search(told)):
            leaves.append(one_line(found[1], told[found.end() :]))
        elif not deeper:  # "and 5 more exceptions", "... (max_group_depth is 10)"
            leaves.append(" ".join(told.split()))
    return leaves


def cause_of(error: str, traceback: str) -> OutOfMemoryCause:
    """Device, phase and bytes of an out-of-memory error, as far as an installed package can read
    its text.

    Those packages are entry points of the group "nbsweep.causes": functions of the error's line and
    its traceback that return the fields of ``OutOfMemoryCause`` they know, or None.
    """
    for point in importlib.metadata.entry_points(group=CAUSES):
        # Whatever is wrong with that package, the run has ended.
        with contextlib.suppress(Exception):
            if found := point.load()(error, traceback):
                return OutOfMemoryCause(**found)
    return OutOfMemoryCause()


def signature_of(error: str) -> str:
    """The error without what differs between runs of the same cause: addresses, numbers, paths,
    quoted texts."""
    text = re.sub(r"0x[0-9a-fA-F]+", "0x…", error)
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "…", text)
    text = re.sub(r"(?<![\w.])[~.]?/[^\s:,)]+", "/…", text)
    return re.sub(r"\d+(?:[.,]\d+)*", "#", text)
