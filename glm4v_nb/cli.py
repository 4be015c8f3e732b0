"""The command line, ``glm4v-nb``: it parses and prints, and calls the functions the notebooks call.

Exit codes: 0 done, 1 failed, 2 wrong use, 3 does not fit, 130 interrupted. Results go to stdout;
progress and errors (one line, also with --json) to stderr, so after code 1 or 2 stdout is empty;
but where only the picture of a frontier could not be saved, the answer is there.

torch is imported by the commands that need it, so that --help does not wait for it.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nbsweep import cli as sweeping
from simgpu.cli import add_fit, option, progress

# Where a clone has what is not part of the package.
TOOLS = Path(__file__).resolve().parents[1] / "tools"

app = typer.Typer(
    help="GLM-4V-9B on several GPUs, simulated or real.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
    """Is this machine ready? Checks driver, GPUs, libraries, memory, disk; exit code 1 if something
    must be mended."""
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
    """Is a checkpoint whole, and do CPU and GPUs agree on its first logits? Prints a block to copy
    into a report; exit code 1 if something is wrong, or nothing could be run.

    The official one needs 57 GiB of the computer's memory in float32, half of it in bfloat16; what
    has no room is named and left out.
    """
    with progress("verifying") as show:
        from glm4v_nb import verify as verification

        found = verification.verify(directory, show)
    print(json.dumps(found.to_dict(), indent=2) if as_json else found.text)
    raise typer.Exit(0 if found.ok else 1)


@app.command()
def diagnose():
    """Which known failure is the error message on stdin? `glm4v-nb diagnose < log.txt`; exit code 1
    where it is none."""
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
