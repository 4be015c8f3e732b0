"""The command line, ``glm4v-nb``: it parses and prints, and calls the functions the notebooks call.

Exit codes: 0 done, 1 failed, 2 wrong use, 3 does not fit, 130 interrupted. Results go to stdout;
progress and errors (one line, also with --json) to stderr, so after code 1 or 2 stdout is empty;
but where only the picture of a frontier could not be saved, the answer is there.

torch is imported by the commands that need it, so that --help does not wait for it.
"""

import json
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from nbsweep import cli as sweeping
from simgpu.catalog import find_card
from simgpu.units import bytes_in_words

GIB = 2**30
# Where a clone has what is not part of the package.
TOOLS = Path(__file__).resolve().parents[1] / "tools"
_STRATEGIES = "auto, balanced, balanced_low_0 or sequential"

app = typer.Typer(
    help="GLM-4V-9B on several GPUs, simulated or real.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _option(kind: type, words: str, *names: str, **more):
    """The annotation of an option: type, what --help says, and names other than the parameter's."""
    return Annotated[kind, typer.Option(*names, help=words, **more)]


@app.command()
def fit(
    context: typer.Context,
    card: _option(
        str, 'Kind of GPU card, such as L4, "RTX 4090", A100-80; others as "My GPU 20GiB".'
    ),
    count: _option(int, "How many of them.") = 1,
    dtype: _option(str, "bfloat16, float16 or float32.") = "bfloat16",
    device_map: _option(
        str, f"{_STRATEGIES}; or modules and cards as JSON, or a JSON file."
    ) = "auto",
    batch_size: _option(int, "Samples at a time.") = 1,
    images: _option(int, "Images per sample, 0 or 1.") = 1,
    text_tokens: _option(int, "Prompt tokens, the image's 1602 positions not counted.") = 32,
    new_tokens: _option(int, "Tokens to generate.") = 128,
    train: _option(bool, "One training step instead of generation.", "--train") = False,
    gradient_checkpointing: _option(
        bool, "With --train: recompute activations.", "--gradient-checkpointing"
    ) = False,
    trained: _option(
        str, "With --train: everything, decoder (the image tower frozen) or lora."
    ) = "everything",
    optimizer: _option(str, "With --train: adamw adds its states and first update.") = "",
    alloc_conf: _option(
        str | None, "PyTorch's PYTORCH_CUDA_ALLOC_CONF, for example expandable_segments:True."
    ) = None,
    limits: _option(
        bool, "Also the largest batch, the longest context and the best device map.", "--limits"
    ) = False,
    frontier: _option(
        str | None, "Draw batch x tokens that fit into this .png, .svg or .pdf.", metavar="FILE"
    ) = None,
    as_json: _option(bool, "Print one JSON object.", "--json") = False,
):
    """Will it fit? Runs the full-size model on simulated cards; exit code 0 if it fits, 3 if not.

    With --limits and --frontier it searches, for up to a minute.
    """
    with _progress("loading torch"):
        from glm4v_nb import fit as fitting  # this command has the same name
        from glm4v_nb.workload import Workload
    workload = Workload(**{name: context.params[name] for name in Workload.__annotations__})
    device_map = fitting.read_device_map(device_map)
    deployment = fitting.Deployment(card, count, dtype, device_map, alloc_conf=alloc_conf)
    found = figure = None
    drawn = {}
    if limits or frontier:
        result, found, figure, drawn = _search(deployment, workload, limits, frontier)
    else:
        with _progress(f"running on {count} x {card}, simulated"):
            result = fitting.fit(workload=workload, **vars(deployment))
    if as_json:
        print(json.dumps((found or result).to_dict() | drawn, indent=2))
    else:
        _print_fit(result, _next_step(context, result))
        if found:
            _print_limits(found)
    if frontier:
        figure.savefig(frontier)  # last: a disk that is full by now takes no answer along
        if not as_json:
            print(f"Picture: {frontier}")
    raise typer.Exit(0 if result.fits else 3)


def _search(deployment, workload, with_limits: bool, picture: str | None):
    """The plain answer, the limits or None, the frontier's figure or None, and its --json."""
    from glm4v_nb import limits as searching

    if picture:
        from glm4v_nb.plots import plot_frontier, plot_path

        plot_path(picture)
    deployment.check(workload)
    token_counts = searching.frontier_tokens(workload, deployment.checkpoint) if picture else []
    with _progress("loading", steps=4 * with_limits + len(token_counts)) as report:
        trials = searching.Trials(deployment, report)
        found = searching.limits(trials, workload) if with_limits else None
        result = found.result if found else searching.fit(workload=workload, **vars(deployment))
        if not picture:
            return result, found, None, {}
        batches = searching.frontier(trials, workload, token_counts)
    name = f"{workload.images} image per sample" if workload.images else "text only"
    title = f"What fits on {deployment.count} x {result.devices[0].card}"
    figure = plot_frontier({name: batches}, title, result.provenance)
    points = [{"text_tokens": n, "largest_batch": batches[n]} for n in batches]
    return result, found, figure, {"frontier": {"file": picture, "points": points}}


def _next_step(context: typer.Context, result) -> str:
    """What to do next: a command line that has been tried, wherever one was seen to fit."""
    from glm4v_nb.advice import what_fits

    with _progress("looking for what fits") as report:
        changes = what_fits(result, report)
    if changes:
        return _command(context, **changes)
    if result.fits:
        return "notebooks/01_will_it_fit.ipynb shows where these bytes go."
    return "nothing that was tried fits, neither more or larger cards nor a smaller batch."


def _command(context: typer.Context, **changes) -> str:
    """The command line just given, with some options changed and without those at their default."""
    words = ["glm4v-nb", context.info_name]
    for option in context.command.params:
        value = changes.get(option.name, context.params[option.name])
        if value != option.default:
            words += option.opts[:1] if value is True else [option.opts[0], str(value)]
    return shlex.join(words)


def _print_fit(result, next_step: str):
    """A ``FitResult`` for people: table, verdict, what to do next."""
    console = Console(highlight=False)
    table = Table("card", title="simulated cards, GiB")
    columns = ("capacity", "weights", "peak allocated", "peak reserved", "free at peak")
    for column in columns:
        table.add_column(column, justify="right")
    for device in result.devices:
        figures = [getattr(device, f"{name.replace(' ', '_')}_bytes") for name in columns]
        cells = [escape(f"{device.index} · {device.card}"), *map(_gib, figures)]
        full = result.oom is not None and result.oom.device == device.index
        table.add_row(*cells, style="bold red" if full else None)
    console.print(table)
    if result.provenance != "simulated":
        console.print(f"The cards are {escape(result.provenance)}.", soft_wrap=True)
    console.print(_verdict(result), soft_wrap=True)
    if result.host is not None:
        console.print(_host_memory(result), soft_wrap=True)
    console.print(f"Next: {escape(next_step)}", soft_wrap=True)


def _verdict(result) -> str:
    """Whether it fits, and by how much, in a sentence; and PyTorch's message."""
    if result.oom is None:
        fullest = min(result.devices, key=lambda device: device.free_at_peak_bytes)
        where = f"card {fullest.index} is the fullest, with"
        free = f"{_gib(fullest.free_at_peak_bytes)} GiB free at its peak"
        if not result.just_fits:
            return f"[green]It fits:[/] {where} {free}."
        differ = _gib(find_card(result.asked[0].card).uncertainty_bytes)
        why = f"drivers and programs make {differ} GiB of difference on such a card"
        return f"[yellow]It just fits:[/] {where} {free}; {why}."
    short = "; ".join(
        f"{bytes_in_words(size)}, {bytes_in_words(size - device.capacity_bytes)} short on card"
        f" {device.index}"
        for device, size in zip(result.devices, result.needs, strict=True)
        if size > device.capacity_bytes
    )
    where = f"card {result.oom.device} is full, phase {result.oom.phase}."
    message = escape(result.oom.message)
    return f"[bold red]It does not fit:[/] {where} It needs {short}.\n{message}"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f}"


def _host_memory(result) -> str:
    """What loading takes of the host's memory, in a sentence."""
    host = result.host
    bounds = (host.sequential_peak_anonymous_bytes, host.peak_anonymous_bytes)
    span = " to ".join(dict.fromkeys(map(_gib, bounds)))  # one figure where both read alike
    files = "files are read through the page cache."
    if host.view_bytes:
        files = (
            f"{_gib(host.view_bytes)} GiB of weights remain in their files, to be read in every"
            " pass through the page cache."
        )
    return (
        f"Host memory to load (simulated): {span} GiB beside Python and CUDA,"
        f" {_gib(host.anonymous_bytes)} GiB stays; {files}"
    )


def _print_limits(found):
    """Largest batch, longest context, and the recommended map with its lines of Python."""
    console = Console(highlight=False, soft_wrap=True)
    reasons = {
        "memory": "one more does not fit",
        "model": "the model's context ends there",
        "search": "the search ends there",
    }
    batch, context, best = found.largest_batch, found.longest_context, found.recommendation
    for edge, label, unit in (
        (batch, "Largest batch", "samples like this"),
        (context, "Longest context", "text tokens"),
    ):
        reason = reasons[edge.limited_by] if edge.size else "not even one fits"
        console.print(f"[bold]{label}:[/] {edge.size} {unit} ({reason})")
    if best is None:
        console.print("[bold]Device map:[/] none of the automatic ones fits.")
        return
    headroom = ", ".join(f"{size / GIB:.1f}" for size in best.headroom_bytes)
    name = best.device_map if isinstance(best.device_map, str) else "everything on the one card"
    memory = " with max_memory" if best.max_memory else ""
    free = f"free at peak, per card: {headroom} GiB."
    console.print(f"[bold]Device map:[/] {name}{memory}; {free} To paste:\n\n{escape(best.code)}\n")


@app.command()
def doctor(
    as_json: _option(bool, "Print one JSON object.", "--json") = False,
    as_report: _option(
        bool, "Print one block of text to paste into a bug report.", "--report"
    ) = False,
):
    """Is this machine ready? Checks driver, GPUs, libraries, memory, disk; exit code 1 if something
    must be mended."""
    with _progress("loading torch"):
        from glm4v_nb import doctor as examination  # this command has the same name
    with _progress("examining this machine"):
        findings = list(examination.examine())
    status = examination.verdict(findings)
    mend = status == examination.STOP
    if as_json:
        answer = {"status": status, "findings": [vars(finding) for finding in findings]}
        print(json.dumps(answer, indent=2))
    elif as_report:
        print(examination.report(findings))
    else:
        console = Console(highlight=False)
        lights = {"ok": "[green]● ok", "look": "[yellow]▲ look", "stop": "[bold red]■ stop"}
        table = Table("", "what", "found", "advice", title="glm4v-nb doctor")
        for finding in findings:
            texts = (finding.subject, finding.found, finding.advice)
            table.add_row(lights[finding.status], *map(escape, texts))
        console.print(table)
        console.print(
            "Next: mend what says stop; glm4v-nb doctor --report prints a block for a bug report."
            if mend
            else "Next: glm4v-nb fit --card L4 --count 2, or open notebooks/01_will_it_fit.ipynb."
        )
    raise typer.Exit(1 if mend else 0)


# --- notebooks: run, sweep and report are nbsweep's own

app.registered_commands += sweeping.app.registered_commands


@app.command()
def validate(
    notebooks: Annotated[
        list[str] | None,
        typer.Argument(help="Numbers such as 01, or .ipynb files; all when left out."),
    ] = None,
    as_json: _option(bool, "Print one JSON object.", "--json") = False,
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


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return sweeping.run_app(app, "glm4v-nb", arguments)


@contextmanager
def _progress(what: str, steps: int | None = None):
    """A spinner, or a bar of so many steps, on stderr while a person looks on; nothing otherwise.

    Gives a function to call with a text that says what is done now, or without after a step.
    """
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn()) if steps else (SpinnerColumn(),)
    options = {"console": console, "transient": True, "disable": not console.is_terminal}
    with Progress(*columns, TextColumn("{task.description}"), **options) as display:
        task = display.add_task(f"{escape(what)} ...", total=steps)
        yield lambda text=None: display.update(task, description=text, advance=int(text is None))


if __name__ == "__main__":
    sys.exit(main())
