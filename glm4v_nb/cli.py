"""The command line, ``glm4v-nb``: it parses and prints, and calls the functions the notebooks call.

Exit codes: 0 done, 1 failed, 2 wrong use, 3 does not fit, 130 interrupted. Results go to stdout;
progress and errors (one line, also with --json) to stderr, so after code 1 or 2 stdout is empty;
but where only the picture of a frontier could not be saved, the answer is there.

torch is imported by the commands that need it, so that --help does not wait for it.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from glm4v_nb import __version__
from nbsweep import cli as sweeping
from simgpu.cli import add_fit, option, progress

# Where a clone has what is not part of the package.
TOOLS = Path(__file__).resolve().parents[1] / "tools"

app = sweeping.App(
    help="GLM-4V-9B on several GPUs, simulated or real.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _say_version(is_wanted: bool):
    if is_wanted:
        print(f"glm4v-nb {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: option(
        bool, "Print the version and exit.", "--version", callback=_say_version, is_eager=True
    ) = False,
):
    """What stands before a command."""


add_fit(
    app,
    option(str, "Another model: a directory with a config.json, or the id of one on the hub."),
    "zai-org/glm-4v-9b",
    "notebooks/01_will_it_fit.ipynb shows where these bytes go.",
    option(str, "How tokens are decoded: eager, static, fast or lookup."),
)


@app.command()
def doctor(
    as_json: option(bool, "Print one JSON object.", "--json") = False,
    as_report: option(
        bool, "Print one block of text to paste into a bug report.", "--report"
    ) = False,
):
    """Is this machine ready? Checks driver, GPUs, libraries, memory, disk.

    Exit code 1 if something must be mended.
    """
    with progress("loading torch"):
        from glm4v_nb import doctor as examination  # this command has the same name
    with progress("examining this machine"):
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


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(help="The folder of a checkpoint.")],
    as_json: option(bool, "Print one JSON object.", "--json") = False,
):
    """Is a checkpoint whole, and do CPU and GPUs agree on its first logits?

    Prints a block to copy into a report; exit code 1 if something is wrong, or nothing could be
    run. The official one needs 57 GiB of the computer's memory in float32, half of it in bfloat16;
    what has no room is named and left out.
    """
    with progress("verifying") as show:
        from glm4v_nb import verify as verification

        found = verification.verify(directory, show)
    print(json.dumps(found.to_dict(), indent=2) if as_json else found.text)
    raise typer.Exit(0 if found.ok else 1)


@app.command()
def ask(
    directory: Annotated[Path, typer.Argument(help="The folder of a checkpoint.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    image: option(Path | None, "The picture that it is about.") = None,
    max_new_tokens: option(int, "Tokens of the answer, at most.") = 128,
    dtype: option(str, "bfloat16, float16, float32, or auto for the checkpoint's.") = "bfloat16",
    decoding: option(str, "eager, static, compiled, fast or lookup.") = "eager",
):
    """Ask a checkpoint a question, on this machine's GPUs or its CPU.

    On several cards that share every layer: torchrun --nproc-per-node 2 -m glm4v_nb ask ...
    """
    from glm4v_nb.inference import Sampling, generate, load

    is_shared, rank = "WORLD_SIZE" in os.environ, int(os.environ.get("RANK", 0))
    message = {"role": "user", "content": question}
    if image is not None:
        message["image"] = str(image)
    try:
        parallel = "tensor" if is_shared else None
        loaded = load(directory, dtype=dtype, decoding=decoding, parallel=parallel)
        answer = generate(*loaded, [message], Sampling(max_new_tokens))
    except Exception as error:
        if rank:  # the first says what all run into, and torchrun ends the others meanwhile
            time.sleep(10)
        for note in getattr(error, "__notes__", ()):  # which rank it is that failed alone
            raise RuntimeError(f"{note} {error}") from error
        raise
    if not rank:
        print(answer.text)


@app.command()
def serve(
    checkpoint: Annotated[str, typer.Argument(help="A folder, or a hub id with --revision.")],
    revision: option(str | None, "Commit of the hub repository, 40 digits.") = None,
    name: option(str | None, "What clients call the model; else the folder's name.") = None,
    host: option(
        str, "Address to listen at; other than this machine's own needs a key."
    ) = "127.0.0.1",
    port: option(int, "Port to listen at.") = 8000,
    api_key_file: option(
        Path | None, "A file with the API key, instead of the variable GLM4V_NB_API_KEY."
    ) = None,
    dtype: option(str, "bfloat16, float16 or float32.") = "bfloat16",
    decoding: option(str, "fast (fused kernels, at most 8 rows), eager, or auto.") = "auto",
    rows: option(int, "Requests that are answered at a time.") = 8,
    queue: option(int, "Requests that may wait besides; more are told to come back (429).") = 64,
    positions: option(
        int | None, "Most of one request, prompt and answer; else what the cards have room for."
    ) = None,
    body_mib: option(int, "Largest body of a request, in MiB.") = 20,
    grace_seconds: option(int, "For what runs, once SIGTERM has come.") = 30,
):
    """Answer over HTTP as OpenAI's chat completions do, text and pictures, whole or streamed.

    Requests join and leave a running batch. How long they may be is tried at the start, so that
    what is let in fits. Exit codes: 0 ended by SIGTERM, 1 failed, 2 wrong use, 3 no room, 130
    Ctrl-C.
    """
    with progress("loading torch"):
        import torch

        from glm4v_nb.serving import command
        from glm4v_nb.serving.options import Options
    options = Options(
        checkpoint, revision, name, host, port, api_key_file, dtype, decoding, rows, queue,
        positions, body_mib, grace_seconds,
    )  # fmt: skip
    try:
        command.serve(options, lambda text: print(text, flush=True))
    except torch.OutOfMemoryError as error:
        print(f"error: It does not fit; fewer --rows need less. {error}", file=sys.stderr)
        raise typer.Exit(3) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command()
def diagnose():
    """Which known failure is the error message on stdin? `glm4v-nb diagnose < log.txt`

    Exit code 1 where it is none.
    """
    from glm4v_nb import diagnose as clinic

    found = clinic.diagnose(sys.stdin.read())
    print(found)
    raise typer.Exit(0 if found.cases else 1)


# --- notebooks: run, sweep and report are nbsweep's own

app.registered_commands += sweeping.app.registered_commands


@app.command()
def validate(
    notebooks: Annotated[
        list[str] | None,
        typer.Argument(help="Numbers such as 01, or .ipynb files; all when left out."),
    ] = None,
    as_json: option(bool, "Print one JSON object.", "--json") = False,
):
    """Do the stored notebooks keep the suite's rules? Runs nothing; exit code 1 if one is broken.

    `make validate` then executes them, too.
    """
    if not (TOOLS / "notebook_rules").is_dir():
        raise ValueError("the rules are not part of the package; run this in a clone of its code")
    sys.path.insert(0, str(TOOLS))
    with progress("loading the rules"):
        from notebook_rules import __main__ as rules
    paths, findings = rules.validate(notebooks or ())
    rules.print_findings(paths, findings, as_json)
    raise typer.Exit(1 if findings else 0)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return sweeping.run_app(app, "glm4v-nb", arguments)


if __name__ == "__main__":
    sys.exit(main())
