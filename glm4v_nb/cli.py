"""The command line, ``glm4v-nb``: it parses and prints, and calls the functions the notebooks call.

Exit codes: 0 done, 1 failed, 2 wrong use, 3 does not fit, 130 interrupted. Results go to stdout;
progress and errors (one line, also with --json) to stderr, so after code 1 or 2 stdout is empty.

torch is imported by the commands that need it, so that --help does not wait for it.
"""

import json
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nbsweep import cli as sweeping

GIB = 2**30
# Where a clone has what is not part of the package.
TOOLS = Path(__file__).resolve().parents[1] / "tools"

app = typer.Typer(
    help="GLM-4V-9B on several GPUs, simulated or real.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _commands():
    """Makes typer keep the commands' names even while there is only one."""


@app.command()
def fit(
    context: typer.Context,
    card: Annotated[
        str, typer.Option(help='Kind of GPU card, such as L4, "RTX 4090", A100-80, H100.')
    ],
    count: Annotated[int, typer.Option(help="How many of them.")] = 1,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device_map: Annotated[
        str,
        typer.Option(
            help=(
                "auto, balanced, balanced_low_0 or sequential; or modules and cards as JSON, or a"
                " JSON file."
            )
        ),
    ] = "auto",
    batch_size: Annotated[int, typer.Option(help="Samples at a time.")] = 1,
    images: Annotated[int, typer.Option(help="Images per sample, 0 or 1.")] = 1,
    text_tokens: Annotated[
        int, typer.Option(help="Prompt tokens, the image's 1602 positions not counted.")
    ] = 32,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 128,
    train: Annotated[
        bool, typer.Option("--train", help="One training step instead of generation.")
    ] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="With --train: recompute activations.")
    ] = False,
    trained: Annotated[
        str,
        typer.Option(help="With --train: everything, decoder (the image tower frozen) or lora."),
    ] = "everything",
    optimizer: Annotated[
        str, typer.Option(help="With --train: adamw adds its states and first update.")
    ] = "",
    alloc_conf: Annotated[
        str | None,
        typer.Option(
            help="PyTorch's PYTORCH_CUDA_ALLOC_CONF, for example expandable_segments:True."
        ),
    ] = None,
    limits: Annotated[
        bool,
        typer.Option(
            "--limits", help="Also the largest batch, the longest context and the best device map."
        ),
    ] = False,
    frontier: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Draw batch x tokens that fit into this .png, .svg or .pdf."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
):
    """Will it fit? Runs the full-size model on simulated cards; exit code 0 if it fits, 3 if not.

    With --limits and --frontier it searches, for up to a minute.
    """
    with _progress("loading torch"):
        from glm4v_nb import fit as fitting  # this command has the same name
        from glm4v_nb.workload import Workload
    workload = Workload(
        batch_size,
        images,
        text_tokens,
        new_tokens,
        train,
        gradient_checkpointing,
        trained,
        optimizer,
    )
    setting = (card, count, dtype, fitting.read_device_map(device_map))
    if limits or frontier:
        answer = _search(setting, workload, alloc_conf, limits, frontier)
    else:
        with _progress(f"running on {count} x {card}, simulated"):
            answer = (fitting.fit(*setting, workload, alloc_conf=alloc_conf), None, None)
    result, found, points = answer
    if as_json:
        print(json.dumps((found or result).to_dict() | (points or {}), indent=2))
    else:
        _print_fit(result, _next_step(context, result))
        if found:
            _print_limits(found, workload)
        if frontier:
            print(f"Picture: {frontier}")
    raise typer.Exit(0 if result.fits else 3)


# run, sweep and report are nbsweep's own.
app.registered_commands += sweeping.app.registered_commands


@app.command()
def validate(
    notebooks: Annotated[
        list[str] | None,
        typer.Argument(help="Numbers such as 01, or .ipynb files; all when left out."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
):
    """Do the stored notebooks keep the suite's rules? Runs nothing; exit code 1 if one is broken.

    `make validate` then executes them, too.
    """
    if not (TOOLS / "notebook_rules").is_dir():
        raise ValueError("the rules are not part of the package; run this in a clone of its code")
    sys.path.insert(0, str(TOOLS))
    with _progress("loading the rules"):
        from notebook_rules import __main__ as rules
    paths, findings = rules.validate(notebooks or ())
    rules.print_findings(paths, findings, as_json)
    raise typer.Exit(1 if findings else 0)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    as_report: Annotated[
        bool, typer.Option("--report", help="Print one block of text to paste into a bug report.")
    ] = False,
):
    """Is this machine ready? Checks driver, GPUs, libraries, memory, disk; exit code 1 if something
    must be mended."""
    with _progress("loading torch"):
        from glm4v_nb import doctor as doctor_module  # this command has the same name
    with _progress("examining this machine"):
        findings = list(doctor_module.examine())
    if as_json:
        print(doctor_module.to_json(findings))
    elif as_report:
        print(doctor_module.report(findings))
    else:
        _print_findings(findings)
    raise typer.Exit(1 if doctor_module.verdict(findings) == doctor_module.STOP else 0)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return sweeping.run_app(app, "glm4v-nb", arguments)


def _progress(what: str):
    """A spinner on stderr while something takes seconds; nothing unless a person is looking."""
    console = Console(stderr=True)
    return console.status(f"{escape(what)} ...") if console.is_terminal else nullcontext()


def _search(setting, workload, alloc_conf: str | None, with_limits: bool, picture: str | None):
    """The plain answer, the limits or None, and the frontier as JSON has it or None; draws the
    picture."""
    from glm4v_nb import fit as fitting
    from glm4v_nb import limits as searching

    if picture:
        from glm4v_nb.plots import plot_frontier, plot_path

        plot_path(picture)
    fitting.check_arguments(*setting[1:], workload)
    token_counts = searching.frontier_tokens(workload) if picture else []
    with _SearchBar(4 * with_limits + len(token_counts)) as bar:
        trials = searching.Trials(*setting, bar=bar, alloc_conf=alloc_conf)
        found = searching.limits(trials, workload, bar) if with_limits else None
        result = found.result if found else fitting.fit(*setting, workload, alloc_conf=alloc_conf)
        if not picture:
            return result, found, None
        batches = searching.frontier(trials, workload, token_counts, bar)
    name = f"{workload.images} image per sample" if workload.images else "text only"
    title = f"What fits on {setting[1]} x {result.devices[0].card}"
    plot_frontier({name: batches}, title, result.provenance).savefig(picture)
    points = [{"text_tokens": tokens, "largest_batch": size} for tokens, size in batches.items()]
    return result, found, {"frontier": {"file": picture, "points": points}}


class _SearchBar:
    """A progress bar on stderr, with the part of tqdm's interface that the search uses; nothing
    unless seen."""

    def __init__(self, total: int):
        console = Console(stderr=True)
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        self._progress = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self._progress.add_task("loading", total=total)

    def __enter__(self):
        self._progress.start()
        return self

    def __exit__(self, *exception):
        self._progress.stop()

    def update(self):
        self._progress.advance(self._task)

    def set_postfix_str(self, text: str):
        self._progress.update(self._task, description=text)


def _next_step(context: typer.Context, result) -> str:
    """What to try, as a command line where there is one."""
    from glm4v_nb.fit import DEVICE_MAPS, cards_for_weights
    from simgpu import MAX_CARDS

    options = context.params
    if result.fits:
        return "notebooks/01_will_it_fit.ipynb shows where these bytes go."
    if result.oom.phase == "backward" and not options["gradient_checkpointing"]:
        return _command(context, gradient_checkpointing=True)
    if options["device_map"] not in DEVICE_MAPS:
        return f"in the device map, move modules from card {result.oom.device} to another."
    more = max(options["count"] + 1, cards_for_weights(options["card"], options["dtype"]))
    if more > MAX_CARDS:
        return "take larger cards, a smaller batch or a shorter prompt."
    return _command(context, count=more)


def _command(context: typer.Context, **changes) -> str:
    """The command line just given, with some options changed; options at their default are left
    out."""
    words = ["glm4v-nb", context.info_name]
    for option in context.command.params:
        value = changes.get(option.name, context.params[option.name])
        if value != option.default:
            words += option.opts[:1] if value is True else [option.opts[0], str(value)]
    return shlex.join(words)


def _print_fit(result, next_step: str):
    """A ``FitResult`` for people: table, verdict, what to do next."""
    console = Console(highlight=False)
    table = Table(title=f"{result.provenance} cards, GiB")
    for column in (
        "card",
        "capacity",
        "weights",
        "peak allocated",
        "peak reserved",
        "free at peak",
    ):
        table.add_column(column, justify="left" if column == "card" else "right")
    for device in result.devices:
        figures = (
            device.capacity_bytes,
            device.weights_bytes,
            device.peak_allocated_bytes,
            device.peak_reserved_bytes,
            device.free_at_peak_bytes,
        )
        full = result.oom is not None and result.oom.device == device.index
        table.add_row(
            escape(f"{device.index} · {device.card}"),
            *(f"{figure / GIB:.2f}" for figure in figures),
            style="bold red" if full else None,
        )
    console.print(table)
    if result.oom is None:
        fullest = min(result.devices, key=lambda device: device.free_at_peak_bytes)
        free = f"{fullest.free_at_peak_bytes / GIB:.2f} GiB"
        console.print(
            f"[green]It fits:[/] card {fullest.index} is the fullest, with {free} free at its peak."
        )
    else:
        console.print(
            f"[bold red]It does not fit:[/] card {result.oom.device} is full, phase"
            f" {result.oom.phase}."
        )
        console.print(escape(result.oom.message), soft_wrap=True)
    if result.host is not None:
        console.print(_host_memory(result), soft_wrap=True)
    console.print(f"Next: {escape(next_step)}", soft_wrap=True)


def _host_memory(result) -> str:
    """What loading takes of the host's memory, in a sentence."""
    host = result.host
    least, most, stays, views = (
        f"{size / GIB:.2f}"
        for size in (
            host.sequential_peak_anonymous_bytes,
            host.peak_anonymous_bytes,
            host.anonymous_bytes,
            host.view_bytes,
        )
    )
    span = most if least == most else f"{least} to {most}"
    text = (
        f"Host memory to load ({result.provenance}): {span} GiB beside Python and CUDA, {stays} GiB"
        " stays; "
    )
    if host.view_bytes:
        text += (
            f"{views} GiB of weights remain in their files, to be read in every pass through the"
            " page cache."
        )
    else:
        text += "files are read through the page cache."
    return text


def _print_limits(found, workload):
    """Largest batch, longest context, and the recommended map with its lines of Python, for
    people."""
    console = Console(highlight=False, soft_wrap=True)
    reasons = {
        "memory": "one more does not fit",
        "model": "the model's context ends there",
        "search": "the search ends there",
    }
    for label, edge, unit in (
        ("Largest batch", found.largest_batch, "samples like this"),
        ("Longest context", found.longest_context, "text tokens"),
    ):
        reason = reasons[edge.limited_by] if edge.size else "not even one fits"
        console.print(f"[bold]{label}:[/] {edge.size} {unit} ({reason})")
    best = found.recommendation
    if best is None:
        console.print(
            "[bold]Device map:[/] none of the automatic ones fits; take more or larger cards."
        )
        return
    headroom = ", ".join(f"{size / GIB:.1f}" for size in best.headroom_bytes)
    name = best.device_map if isinstance(best.device_map, str) else "everything on the one card"
    memory = " with max_memory" if best.max_memory else ""
    console.print(
        f"[bold]Device map:[/] {name}{memory}; free at peak, per card: {headroom} GiB. To paste:\n"
    )
    console.print(escape(best.code) + "\n")


def _print_findings(findings):
    """The doctor's findings as a table of traffic lights."""
    console = Console(highlight=False)
    lights = {"ok": "[green]● ok[/]", "look": "[yellow]▲ look[/]", "stop": "[bold red]■ stop[/]"}
    table = Table("", "what", "found", "advice", title="glm4v-nb doctor")
    for finding in findings:
        texts = (finding.subject, finding.found, finding.advice)
        table.add_row(lights[finding.status], *map(escape, texts))
    console.print(table)
    if any(finding.status == "stop" for finding in findings):
        console.print(
            "Next: mend what says stop; glm4v-nb doctor --report prints a block for a bug report."
        )
    else:
        console.print(
            "Next: glm4v-nb fit --card L4 --count 2, or open notebooks/01_will_it_fit.ipynb."
        )


if __name__ == "__main__":
    sys.exit(main())
