"""The command line, ``nbsweep``: it parses and prints, and calls the functions that notebooks call.

Exit codes: 0 done, 1 failed, 2 wrong use, 3 out of memory, 130 interrupted. Results go to stdout;
errors (one line, also with --json) to stderr.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from typer import Argument, Option

# The base of typer's errors of wrong use; typer itself gives it no public name.
UsageError = typer.BadParameter.__base__


class OneOfEach(typer.core.TyperCommand):
    """A command that refuses an option given twice; typer takes the last and says nothing."""

    def make_parser(self, context):
        parser = super().make_parser(context)
        for option in {*parser._long_opt.values(), *parser._short_opt.values()}:
            if option.takes_value and not option.obj.multiple:
                option.process = partial(_process_once, option, option.process)
        return parser


def _process_once(option, process, value: str, state):
    if option.dest in state.opts:
        names, other = " / ".join(option.obj.opts), state.opts[option.dest]
        raise UsageError(f"{names} is given twice, {other!r} and {value!r}; give it once.")
    process(value, state)


class App(typer.Typer):
    """A command line all of whose commands are ``OneOfEach``, or a subclass of it."""

    def command(self, *names, cls=OneOfEach, **more):
        return super().command(*names, cls=cls, **more)


app = App(
    help="Rerun notebooks: with other parameters, many times, on several machines.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

DRY_RUN = Option("--dry-run", help="Print what would run, how long, and what would not fit.")
FORCE = Option("--force", help="Also what is done already.")
AS_JSON = Option("--json", help="Print the runs as one JSON array.")
REGISTRY = Option("--registry", help="The registry.toml; notebooks/registry.toml if left out.")
NOTEBOOKS = Argument(help="Numbers such as 01 02, or files; all if left out.")
PAIR = Option("-p", metavar="NAME VALUE", help="A parameter of the one notebook; may be repeated.")
OUTPUT = Option(help="Folder that receives suite/, suite-01-02/ or, with -p, the notebook's.")
WORKERS = Option(min=1, help="Runs at a time on this machine; 2 if left out.")
SCHEDULER = Option(
    metavar="ADDRESS", help="A Dask cluster that does the runs, such as tcp://10.0.0.1:8786."
)


@app.callback()
def _commands():
    """Makes typer keep the commands' names."""


class _WithPairs(OneOfEach):
    """Takes `-p NAME VALUE`, as papermill has it, for `-p NAME -p VALUE`: typer has no repeated
    option of two words."""

    def parse_args(self, context, arguments):
        words, said = list(arguments), []
        while words:
            said.append(words.pop(0))
            if said[-1] == "-p":
                if len(words) < 2:
                    raise typer.BadParameter(
                        "-p needs a name and a value, as in: run 01 -p card H100"
                    )
                said += [words.pop(0), "-p", words.pop(0)]
        return super().parse_args(context, said)


@app.command(cls=_WithPairs)
def run(
    notebooks: Annotated[list[str] | None, NOTEBOOKS] = None,
    parameter: Annotated[list[str] | None, PAIR] = None,
    workers: Annotated[int, Option(min=1, help="Notebooks at a time.")] = 2,
    dry_run: Annotated[bool, DRY_RUN] = False,
    force: Annotated[bool, FORCE] = False,
    output: Annotated[str, OUTPUT] = "runs",
    registry: Annotated[str | None, REGISTRY] = None,
    as_json: Annotated[bool, AS_JSON] = False,
):
    """Execute notebooks, all of the registry or some; with -p, one with other parameters.

    The same command again does what is not done yet, or whose notebook or package has changed
    since. Exit codes are those of sweep.
    """
    from .plan import plan_notebook, plan_suite

    if not parameter:
        plan = plan_suite(notebooks, registry)
    elif notebooks and len(notebooks) == 1:
        pairs = list(zip(parameter[::2], parameter[1::2], strict=True))
        plan = plan_notebook(notebooks[0], pairs, registry)
    else:
        raise ValueError(
            "-p is for one notebook; give exactly one number before it, as in: run 01 -p card H100"
        )
    _perform(plan, dry_run, as_json, output, workers, force=force, retry=True)


@app.command()
def sweep(
    file: Annotated[str, Argument(help="A sweep file, such as sweeps/fit.toml.")],
    workers: Annotated[int | None, WORKERS] = None,
    scheduler: Annotated[str | None, SCHEDULER] = None,
    dry_run: Annotated[bool, DRY_RUN] = False,
    force: Annotated[bool, FORCE] = False,
    retry: Annotated[bool, Option("--retry", help="Also what failed or took too long.")] = False,
    output: Annotated[str, Option(help="Folder that receives <name>/.")] = "runs",
    registry: Annotated[str | None, REGISTRY] = None,
    as_json: Annotated[bool, AS_JSON] = False,
):
    """Run notebooks with many parameters; the same command goes on where it was interrupted.

    Exit code 0 if all are done, 3 if some ran out of memory, 1 if one failed, took too long or was
    killed.
    """
    from .plan import plan_file

    plan = plan_file(file, registry)
    if scheduler and workers is not None and not dry_run:
        said = f"--workers {workers} is not used: the cluster decides how many run at a time."
        print(said, file=sys.stderr)
    more = {"force": force, "retry": retry, "scheduler": scheduler}
    _perform(plan, dry_run, as_json, output, workers or 2, **more)


@app.command()
def report(
    folder: Annotated[str, Argument(help="The folder of a sweep, such as runs/fit.")],
    compare: Annotated[
        str | None, Option(help="Another sweep's folder: what changed from it to this one.")
    ] = None,
    tolerance: Annotated[
        float, Option(help="With --compare: relative change that is no change.")
    ] = 0.01,
):
    """Write a sweep's report.html, runs.csv and runs.parquet, or a comparison of two sweeps."""
    from .report import write_comparison, write_report

    if compare:
        page = Path(folder) / f"changes-from-{Path(compare).name}.html"
        print(f"Open {write_comparison(compare, folder, page, tolerance)}")
    else:
        print(f"Open {write_report(folder)}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line ``nbsweep``; returns the exit code."""
    return run_app(app, "nbsweep", arguments)


def run_app(application: typer.Typer, name: str, arguments: list[str] | None = None) -> int:
    """Run a command line; what goes wrong is one line on stderr, and the exit code its kind."""
    arguments = [str(each) for each in (sys.argv[1:] if arguments is None else arguments)]
    try:
        return application(arguments or ["--help"], prog_name=name, standalone_mode=False) or 0
    except typer.Abort:
        return _fail("interrupted before anything was begun", 130)
    except UsageError as error:
        return _fail(error.format_message(), 2)
    except ValueError as error:
        return _fail(error, 2)
    except (RuntimeError, OSError, MemoryError) as error:
        return _fail(error, 1)


def _fail(error: Exception | str, code: int) -> int:
    print("error:", " ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
    return code


def _perform(plan, dry_run: bool, as_json: bool, output: str, workers: int, **more):
    """Do a plan, write its report, print how it went and leave with its exit code; or print what
    there is to do. ``more`` goes to ``carry_out``."""
    from .display import print_plan, print_runs
    from .report import write_report
    from .runner import carry_out, exit_code

    if dry_run:
        print_plan(plan, workers, as_json)
        return
    console = Console(stderr=as_json)
    try:
        with _signals_interrupt():
            runs, directory = carry_out(plan, output, workers, console, **more)
    except KeyboardInterrupt:
        with contextlib.suppress(FileNotFoundError):  # before anything was begun
            write_report(Path(output) / plan.name)
        again = "Without --force the same command" if more["force"] else "The same command"
        console.print(f"Interrupted. What has ended is kept. {again} goes on where it stopped.")
        raise typer.Exit(130) from None
    page = write_report(directory)
    if as_json:
        print(json.dumps([run.model_dump() for run in runs], indent=2))
    else:
        print_runs(runs, console)
        console.print(f"Open {escape(str(page))}", soft_wrap=True, highlight=False)
    raise typer.Exit(exit_code(runs))


@contextlib.contextmanager
def _signals_interrupt():
    """Take the end of a terminal or a session for an interrupt: what runs is ended in order.

    A signal that is ignored, as nohup has it, stays so.
    """
    both = (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))
    taken = [number for number in both if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
