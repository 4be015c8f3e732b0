"""The command line, ``simgpu``: it parses and prints, and calls what is there in Python too.

Exit codes: 0 done, 1 failed, 2 wrong use, 3 does not fit, 130 interrupted. Results go to stdout;
progress and errors to stderr, so after code 1 or 2 stdout holds nothing of ours. torch is imported
by the commands that need it, so that --help does not wait for it.
"""

import inspect
import json
import shlex
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from simgpu import printing

_STRATEGIES = "auto, balanced, balanced_low_0 or sequential"
_CARD = 'Kind of GPU card, such as L4, "RTX 4090", A100-80; others as "My GPU 20GiB".'

# typer has its own kind of click and names only this subclass.
UsageError = typer.BadParameter.__base__


class OneOfEach(typer.core.TyperCommand):
    """A command that refuses an option given twice; typer takes the last and says nothing.

    nbsweep has the same: neither may import the other.
    """

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
    help="GPUs without a GPU: what PyTorch programs take of cards that are not there.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def option(kind: type, words: str, *names: str, **more):
    """The annotation of an option: type, what --help says, and names other than the parameter's."""
    return Annotated[kind, typer.Option(*names, help=words, **more)]


# The options that say which cards are simulated; ``chosen_cards`` reads them.
CardKind = option(
    str | None, 'Kind of GPU card, such as L4, "RTX 4090", A100-80; others as "My GPU 20GiB".'
)
Count = option(int, "How many of them.")
Cards = option(str | None, 'Cards that differ, as "RTX 4090,RTX 3090", instead of --card.')
MemoryGib = option(float | None, "Memory of --card, where yours has more or less.")
FreeGib = option(
    str | None, "GiB free on each card where others use the rest, as nvidia-smi shows: 10, or 9,20."
)
AllocConf = option(
    str | None, "PyTorch's PYTORCH_CUDA_ALLOC_CONF, for example expandable_segments:True."
)
Assume = option(str, "Numbers that are not known: count those assumed, or refuse to assume any.")


def chosen_cards(options: dict) -> dict:
    """The options of cards as the arguments of a ``SimulatedRig``.

    Raises:
        ValueError: no card, or two answers to one question.
    """
    card, cards, memory = (options[name] for name in ("card", "cards", "memory_gib"))
    if card is None and cards is None:
        raise ValueError("Missing option '--card': the kind of card, or --cards.")
    if cards is not None:
        if card is not None or memory is not None or options["count"] != 1:
            given = "--cards names every card: leave --card, --count and --memory-gib out."
            raise ValueError(given)
        card = tuple(name.strip() for name in cards.split(","))
    elif memory is not None:
        card = f"{card} {memory:g}GiB"
    free = options["free_gib"]
    if free is not None:
        try:
            free = [float(each) for each in free.split(",")]
        except ValueError:
            expected = f"--free-gib is {free!r}; expected GiB, as 10, or of every card, as 10,20."
            raise ValueError(expected) from None
        free = free[0] if len(free) == 1 else tuple(free)
    names = ("count", "alloc_conf", "assume")
    return {"card": card, "free_gib": free} | {name: options[name] for name in names}


def add_fit(to: typer.Typer, model, default, when_it_fits: str, decoding=None):
    """Add the command ``fit`` to a command line.

    Args:
        model: the annotation of the parameter that names the model.
        default: its default; ``inspect.Parameter.empty`` if it must be given.
        when_it_fits: what is said to be next where nothing is to be changed; by default --limits.
        decoding: the annotation of --decoding, where models can be asked in several ways.
    """

    def fit(**options):
        _fit(when_it_fits, **options)

    given = dict(inspect.signature(_fit).parameters)
    del given["when_it_fits"]
    given["model"] = given["model"].replace(default=default, annotation=model)
    given["decoding"] = given["decoding"].replace(annotation=decoding)
    if decoding is None:
        del given["decoding"]
    parameters = given.values()
    fit.__doc__, fit.__signature__ = _fit.__doc__, inspect.Signature(parameters)
    fit.__annotations__ = {each.name: each.annotation for each in parameters}
    to.command("fit")(fit)


def _fit(
    when_it_fits: str,
    *,
    context: typer.Context,
    model,
    card: CardKind = None,
    count: Count = 1,
    cards: Cards = None,
    memory_gib: MemoryGib = None,
    free_gib: FreeGib = None,
    dtype: option(str, "bfloat16, float16 or float32.") = "bfloat16",
    device_map: option(
        str, f"{_STRATEGIES}; or modules and cards as JSON, or a JSON file."
    ) = "auto",
    weights: option(
        str | None, "Quantised while loading: int8, int4 or nf4; for models whose package says how."
    ) = None,
    keep: option(
        str | None, "With --weights: modules left as they are, separated by commas."
    ) = None,
    batch_size: option(int, "Samples at a time.", "--batch-size", "--batch") = 1,
    images: option(int | None, "Images per sample; 1 where the model takes some.") = None,
    text_tokens: option(
        int, "Prompt tokens, positions of images not counted.", "--text-tokens", "--tokens"
    ) = 32,
    new_tokens: option(int | None, "Tokens to generate; 128 where the model does.") = None,
    train: option(bool, "One training step instead of generation.", "--train") = False,
    gradient_checkpointing: option(
        bool, "With --train: recompute activations.", "--gradient-checkpointing"
    ) = False,
    trained: option(
        str, "With --train: everything, decoder (the image tower frozen) or lora."
    ) = "everything",
    optimizer: option(str, "With --train: adamw adds its states and first update.") = "",
    parallel: option(
        str | None, "tensor: every card has a part of each layer, and a process."
    ) = None,
    alloc_conf: AllocConf = None,
    assume: Assume = "count",
    decoding: str = "eager",
    limits: option(
        bool, "Also the largest batch, the longest context and the best device map.", "--limits"
    ) = False,
    frontier: option(
        str | None, "Draw batch x tokens that fit into this .png, .svg or .pdf.", metavar="FILE"
    ) = None,
    plot: option(
        str | None, "Draw every card's peak by purpose into such a file.", metavar="FILE"
    ) = None,
    as_json: option(bool, "Print one JSON object.", "--json") = False,
):
    """Will it fit? Runs the full-size model on simulated cards; exit code 0 if it fits, 3 if not.

    With --limits and --frontier it searches, for up to a minute.
    """
    chosen = chosen_cards(context.params)
    with progress("loading torch"):
        from simgpu import fitting, ranks
    if parallel and (limits or frontier):
        given = "--limits" if limits else "--frontier"
        raise ValueError(
            f"{given} searches among device maps, which --parallel has none of. Leave one out."
        )
    deployment = ranks.deployment_class(parallel)(
        dtype=dtype,
        device_map=fitting.read_device_map(device_map),
        checkpoint=model,
        decoding=decoding,
        weights=weights,
        keep=keep if keep is None else [name for name in keep.split(",") if name],
        **chosen,
    )
    deployment.rig()
    names = [*fitting.Workload.__annotations__]
    workload = deployment.recipe.workload(**{name: context.params[name] for name in names})
    for picture in filter(None, (frontier, plot)):
        from simgpu.plots import plot_path

        plot_path(picture)
    found = figure = None
    drawn = {}
    if limits or frontier:
        result, found, figure, drawn = _search(deployment, workload, limits, frontier)
    else:
        with progress(f"running on {printing.kinds(deployment.cards)}, simulated"):
            result = deployment.fit(workload)
    if as_json:
        print(json.dumps((found or result).to_dict() | drawn, indent=2))
    else:
        printing.print_fit(result, _next_step(context, result, when_it_fits))
        if found:
            printing.print_limits(found)
    pictures = {frontier: figure} if frontier else {}
    if plot:
        pictures[plot] = printing.plot_fit(result)
    for file, picture in pictures.items():
        picture.savefig(file)  # last: a disk that is full by now takes no answer along
        if not as_json:
            print(f"Picture: {file}")
    raise typer.Exit(0 if result.fits else 3)


def _search(deployment, workload, with_limits: bool, picture: str | None):
    """The plain answer, the limits or None, the frontier's figure or None, and its --json."""
    from simgpu import limits as searching

    deployment.check(workload)
    lengths = searching.frontier_tokens(workload, deployment.recipe) if picture else []
    with progress("loading", steps=4 * with_limits + len(lengths)) as report:
        trials = searching.Trials(deployment, report)
        found = searching.limits(trials, workload) if with_limits else None
        result = found.result if found else deployment.fit(workload)
        if not picture:
            return result, found, None, {}
        batches = searching.frontier(trials, workload, lengths)
    from simgpu.plots import plot_frontier

    name = f"{workload.images} image per sample" if workload.images else "text only"
    title = f"What fits on {printing.kinds(deployment.cards)}"
    figure = plot_frontier({name: batches}, title, result.provenance)
    points = [{"text_tokens": n, "largest_batch": batches[n]} for n in batches]
    return result, found, figure, {"frontier": {"file": picture, "points": points}}


def _next_step(context: typer.Context, result, when_it_fits: str) -> str:
    """What to do next: a command line that has been tried, wherever one was seen to fit."""
    from simgpu.advice import what_fits

    with progress("looking for what fits") as report:
        changes = what_fits(result, report)
    if changes:
        return _command(context, **({"memory_gib": None} if "card" in changes else {}), **changes)
    if result.fits:
        return when_it_fits or ("" if context.params["limits"] else _command(context, limits=True))
    return "nothing that was tried fits, neither more or larger cards nor a smaller batch."


def _command(context: typer.Context, **changes) -> str:
    """The command line just given, with some options changed and without those at their default."""
    words = [context.find_root().info_name, context.info_name]
    for each in context.command.params:
        value = changes.get(each.name, context.params[each.name])
        if each.param_type_name == "argument":
            words.append(str(value))
        elif value != each.default:
            words += each.opts[:1] if value is True else [each.opts[0], str(value)]
    return shlex.join(words)


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
    }
)
def run(
    context: typer.Context,
    script: Annotated[str, typer.Argument(help="A Python script; its own arguments follow it.")],
    card: CardKind = None,
    count: Count = 1,
    cards: Cards = None,
    memory_gib: MemoryGib = None,
    free_gib: FreeGib = None,
    steps: option(int, "Ends it after so many optimizer.step(); without any at its own end.") = 2,
    as_json: option(
        str | None, "Write the answer into this file.", "--json", metavar="FILE"
    ) = None,
    alloc_conf: AllocConf = None,
    assume: Assume = "count",
):
    """Run a script on simulated cards to its first steps: what it takes, by purpose and by line.

    Exit code 0 if it fits, 3 if it ran out of memory, 1 if it failed by itself. If it does not fit
    it is run once more in silence, for what it would need.
    """
    chosen = chosen_cards(context.params)
    with progress("loading torch"):
        from simgpu.estimation import estimate
        from simgpu.program import Program
        from simgpu.simulated import SimulatedRig
    program = Program(script, context.args, steps)
    SimulatedRig(**chosen)  # what is wrong with the cards is said before anything runs
    try:
        found = estimate(program, **chosen)
    except SystemExit as end:
        raise RuntimeError(f"{script} ended itself with {end.code!r}.") from None
    except Exception as error:
        sys.stdout.flush()
        print(program.own_traceback(error), end="", file=sys.stderr)
        raise typer.Exit(1) from None
    sys.stdout.flush()
    print(program.out_of_memory, end="", file=sys.stderr)
    printing.print_estimate(found, f"{script}, {program.steps_done} steps")
    if as_json:
        text = json.dumps(found.to_dict() | {"steps": program.steps_done}, indent=2)
        Path(as_json).write_text(text + "\n", encoding="utf-8")
    raise typer.Exit(0 if found.fits else 3)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = [str(each) for each in (sys.argv[1:] if arguments is None else arguments)]
    try:
        return app(arguments or ["--help"], prog_name="simgpu", standalone_mode=False) or 0
    except typer.Abort:
        return _fail("interrupted", 130)
    except UsageError as error:
        return _fail(error.format_message(), 2)
    except ValueError as error:
        return _fail(error, 2)
    except (RuntimeError, OSError, MemoryError) as error:
        return _fail(error, 1)


def _fail(error: Exception | str, code: int) -> int:
    print("error:", " ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
    return code


@contextmanager
def progress(what: str, steps: int | None = None):
    """A spinner, or a bar of so many steps, on stderr while a person looks on; nothing otherwise.

    Gives a function to call with a text that says what is done now, or without after a step.
    """
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn()) if steps else (SpinnerColumn(),)
    options = {"console": console, "transient": True, "disable": not console.is_terminal}
    with Progress(*columns, TextColumn("{task.description}"), **options) as display:
        task = display.add_task(f"{escape(what)} ...", total=steps)
        yield lambda text=None: display.update(task, description=text, advance=int(text is None))


add_fit(
    app,
    Annotated[
        str,
        typer.Argument(
            help="A directory with a config.json, or the id of a model on the hub.", metavar="MODEL"
        ),
    ],
    inspect.Parameter.empty,
    "",
)
