"""``diagnose``: which known failure is this error message? By pattern, from ``failures.toml``."""

import re
import textwrap
import tomllib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NOTEBOOK = "notebooks/13_failure_clinic.ipynb"
# Colours and other control sequences that Jupyter and terminals put into a traceback.
_ANSI = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[@-Z\\-_])")


@dataclass(frozen=True)
class Case:
    """A failure that users met: what it is called, why it happens and what to do."""

    heading: str
    patterns: tuple[str, ...]
    cause: str
    cure: str
    reports: tuple[str, ...]
    unless: tuple[str, ...] = ()

    @property
    def link(self) -> str:
        """The section of notebook 13; Jupyter's headings have dashes for spaces."""
        return f"{NOTEBOOK}#{self.heading.replace(' ', '-')}"

    def matches(self, message: str) -> bool:
        def found(patterns):
            return any(re.search(pattern, message, re.IGNORECASE) for pattern in patterns)

        return found(self.patterns) and not found(self.unless)

    def __str__(self):
        lines = [f"Case {self.heading}"]
        for name, text in (("Cause", self.cause), ("Cure", self.cure)):
            lines += textwrap.wrap(f"{name}: {text}", 96, subsequent_indent="  ")
        return "\n".join([*lines, f"See {self.link}"])


@dataclass(frozen=True)
class Diagnosis:
    """The cases that a message may be, in the order of the clinic; none when it is unknown."""

    cases: tuple[Case, ...]

    def __str__(self):
        if self.cases:
            return "\n\n".join(map(str, self.cases))
        return (
            f"Not one of the {len(CASES)} cases known here, which does not mean that nothing is"
            " wrong.\nTry: paste the whole traceback, not only its last line; run glm4v-nb doctor;"
            " search the last line\nin the issues of the library whose file raised it. A bug report"
            " wants glm4v-nb doctor --report."
        )

    __repr__ = __str__  # the last line of a cell shows it


def diagnose(message: str | BaseException) -> Diagnosis:
    """Find the known failures in an error message, a whole traceback, or an exception.

    Raises:
        TypeError: neither text nor an exception.
    """
    if isinstance(message, BaseException):
        message = f"{type(message).__name__}: {message}"
    if not isinstance(message, str):
        raise TypeError(
            f"diagnose takes an error message or an exception, not {type(message).__name__}. Paste"
            ' the text between quotes: diagnose("""…""").'
        )
    text = " ".join(_ANSI.sub("", message).replace("’", "'").split())
    return Diagnosis(tuple(case for case in CASES if case.matches(text)))


@contextmanager
def reproduce(number: int):
    """Show the error that ends the ``with`` block, and make sure that ``diagnose`` finds the case.

    Raises:
        AssertionError: the block did not end with an error, or with one of another case.
    """
    try:
        yield
    except Exception as error:
        print(textwrap.shorten(f"{type(error).__name__}: {error}", 280, placeholder=" ..."))
        assert CASES[number - 1] in diagnose(error).cases, f"not recognised as case {number}"
    else:
        raise AssertionError(f"case {number} did not happen here")


def _read_cases() -> tuple[Case, ...]:
    path = Path(__file__).with_name("failures.toml")
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["case"]
    return tuple(
        Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()})
        for entry in entries
    )


CASES = _read_cases()
