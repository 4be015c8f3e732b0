"""What a text tells about the machine it was made on: absolute paths, host name, user name."""

from __future__ import annotations

import getpass
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Folders in which machines keep what is theirs. /content is every Colab's, /dev/nvidia0 every
# driver's; and a name such as /layers/0 is no path at all, so not everything with slashes counts.
_ROOTS = "home|media|mnt|nix|opt|private|root|scratch|srv|tmp|usr|Users|var|work|workspace"
# What terminals take for commands, such as colours: sent, or written out as Python and JSON do.
_ESCAPE = re.compile(
    r"(?:\x1b|\\x1b|\\u001b|\\033)(?:\[[0-?]*[ -/]*[@-~]|[ -/]+[0-~]|[0-Z^-~])"
    r"|\x9b[0-?]*[ -/]*[@-~]",
    re.IGNORECASE,
)
_TAG = re.compile(r"<[^<>]*>")
_PATTERNS = (
    # Not inside an address or a relative path; after file:// it is a path again.
    re.compile(rf"(?:(?<![\w.~/])|(?<=file://))/(?:{_ROOTS})/[\w.+@-]+"),
    re.compile(r"(?:site|dist)-packages[/\\]+[\w.]+"),
    re.compile(
        r"(?<!\w)[A-Za-z]:(?:\\+[\w.$ -]+){2,}"
    ),  # C:\Users\name, also with its backslashes doubled
)


def find_machine_traces(text: str) -> list[str]:
    """Every path of some machine, and this machine's host and user name, as they stand in the
    text."""
    text = _ESCAPE.sub("", text)  # its last letter would stand before the path
    texts = {text, _TAG.sub("", text)}  # which may part a path, as where its last name is coloured
    patterns = (*_PATTERNS, *_of_this_machine())
    found = {
        match.group() for one in texts for pattern in patterns for match in pattern.finditer(one)
    }
    # A folder is named by the path of a file in it.
    return sorted(one for one in found if not any(other != one and one in other for other in found))


def _of_this_machine() -> Iterator[re.Pattern]:
    folders = {str(Path.home()), tempfile.gettempdir(), sys.prefix, os.getcwd()}
    for folder in folders:
        if len(folder) > 1 and not folder.startswith("/content"):
            yield re.compile(rf"(?<![\w.~/]){re.escape(folder)}(?![\w-])")
    host = platform.node()
    # "laptop" is also a word that lessons use; "gpu-17" and "a1b2c3" are not.
    if len(host) > 3 and re.search(r"[\d.-]", host):
        yield re.compile(rf"(?<![\w.-]){re.escape(host)}(?![\w-])")
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return
    # A name may be a word too; in front of an @ it is nobody's but the user's.
    yield re.compile(rf"(?<![\w.-]){re.escape(user)}@[\w.-]+")
