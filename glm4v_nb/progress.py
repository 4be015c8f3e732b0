"""The one progress display: what is being done, and how far, on stderr while a person looks on."""

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as RichProgress


class Progress:
    """In its ``with`` block a spinner, or with ``steps`` a bar, where stderr is a terminal.

    Args:
        what: is being done, as "loading torch".
        steps: how many ``advance`` calls make the whole; None if nobody knows.
    """

    def __init__(self, what: str, steps: int | None = None):
        console = Console(stderr=True)
        bar = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        columns = bar if steps else (SpinnerColumn(),)
        self._display = RichProgress(
            *columns,
            TextColumn("{task.description}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._display.add_task(f"{escape(what)} ...", total=steps)

    def __enter__(self) -> "Progress":
        self._display.start()
        return self

    def __exit__(self, *exception):
        self._display.stop()

    def describe(self, text: str):
        """Say what is being done now."""
        self._display.update(self._task, description=escape(text))

    def advance(self):
        """One step more is done."""
        self._display.advance(self._task)
