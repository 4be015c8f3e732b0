"""What the notebooks' cards hold, stage by stage: on this machine's GPUs where it has enough, else
simulated.

    python benchmarks/notebooks.py cache    # random weights where the model is looked for, 27.8 GB
    python benchmarks/notebooks.py run FILE 01 02 03 [-p NAME VALUE ...] [--executed DIR]
    python benchmarks/notebooks.py compare MEASURED SIMULATED

The notebooks run unchanged: a cell before the first notes every rig, a cell after the last writes
their stages down.
"""

import argparse
import json
import shutil
import sys
import time
from itertools import zip_longest
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from nbsweep.parameters import parse_notebook, parse_value

MIB = 2**20
NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
REPOSITORY, COMMIT = "models--zai-org--glm-4v-9b", "0" * 40
BEFORE = """
from simgpu import Rig as _Rig
_rigs, _init = [], _Rig.__init__
def _noted(self):
    _init(self)
    _rigs.append(self)
_Rig.__init__ = _noted
"""
AFTER = """
import json as _json
print(_json.dumps([
    {
        "provenance": rig.provenance,
        "stages": [
            {
                "stage": stage.name,
                "peak_allocated_bytes": [card.peak_allocated_bytes for card in stage.memory],
                "peak_reserved_bytes": [card.peak_reserved_bytes for card in stage.memory],
                "allocated_bytes": [card.allocated_bytes for card in stage.memory],
                "out_of_memory": stage.out_of_memory,
            }
            for stage in rig.stages
        ],
    }
    for rig in _rigs if rig.stages
]))
"""


def cache():
    """Write random weights into the hub's cache on this machine, under a commit that does not
    exist."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from memory import write_checkpoint

    repository = Path(HF_HUB_CACHE) / REPOSITORY
    snapshot = repository / "snapshots" / COMMIT
    if repository.exists():
        sys.exit(f"error: {repository} exists already; nothing was written")
    try:
        write_checkpoint(str(snapshot))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    except BaseException:  # a full disk, Ctrl-C: half a checkpoint would be loaded, or in the way
        shutil.rmtree(repository, ignore_errors=True)
        raise


def run(number: str, parameters: dict[str, str], executed: str) -> dict:
    """Execute one notebook; its rigs' stages, or the error that ended it.

    ``parameters``: text by name, as on the command line; what the notebook does not have is left
    out.
    """
    path = next(NOTEBOOKS.glob(f"{number}_*.ipynb"))
    notebook = load_notebook_node(str(path))
    defaults = parse_notebook(path).parameters
    known = {
        name: parse_value(text, defaults[name])
        for name, text in parameters.items()
        if name in defaults
    }
    if known:
        notebook = parameterize_notebook(notebook, known)
    before, after = nbformat.v4.new_code_cell(BEFORE), nbformat.v4.new_code_cell(AFTER)
    notebook.cells = [before, *notebook.cells, after]
    begin, error = time.perf_counter(), None
    try:
        NotebookClient(
            notebook, timeout=500, resources={"metadata": {"path": str(NOTEBOOKS)}}
        ).execute()
    except CellExecutionError as failure:
        error = str(failure)
    if executed:
        Path(executed).mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, Path(executed) / path.name)
    rigs = [] if error else json.loads(after.outputs[0].text)
    seconds = round(time.perf_counter() - begin, 1)
    return {
        "notebook": path.name,
        "parameters": known,
        "seconds": seconds,
        "rigs": rigs,
        "error": error,
    }


def compare(measured: dict, simulated: dict) -> int:
    """Print both worlds' peaks of every stage that was measured; returns how many stages ended
    differently."""
    different = 0
    for result in measured["notebooks"]:
        alike = ("notebook", "parameters")
        other = [
            each
            for each in simulated["notebooks"]
            if all(each[key] == result[key] for key in alike)
        ]
        print(
            result["notebook"], "ERROR" if result.get("error") else "" if other else "not simulated"
        )
        for real, ours in zip_longest(result["rigs"], other[-1]["rigs"] if other else []):
            if real is None or ours is None or not real["provenance"].startswith("measured"):
                continue
            for one, two in zip_longest(real["stages"], ours["stages"]):
                if (
                    one is None
                    or two is None
                    or bool(one["out_of_memory"]) != bool(two["out_of_memory"])
                ):
                    different += 1
                    print("   DIFFERENT", one, two)
                    continue
                if len(one["peak_allocated_bytes"]) != len(two["peak_allocated_bytes"]):
                    continue  # this machine as it is: other devices there than here
                for name in ("peak_allocated_bytes", "peak_reserved_bytes"):
                    apart = [(b - a) / MIB for a, b in zip(one[name], two[name], strict=True)]
                    shown = ", ".join(
                        f"{a / MIB:10.1f} {by:+8.1f}"
                        for a, by in zip(one[name], apart, strict=True)
                    )
                    print(f"   {one['stage'][:24]:24s} {name:21s} {shown}")
    return different


def main() -> int:
    """Read the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("cache", help="random weights in the hub's cache")
    runs = commands.add_parser("run", help="execute notebooks and write their stages down")
    runs.add_argument("output")
    runs.add_argument("numbers", nargs="+")
    runs.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    runs.add_argument(
        "--executed", default="", help="also keep the executed notebooks in this folder"
    )
    both = commands.add_parser("compare", help="two files that `run` wrote")
    both.add_argument("files", nargs=2)
    arguments = parser.parse_args()
    if arguments.command == "cache":
        cache()
    elif arguments.command == "compare":
        return min(
            1, compare(*(json.loads(Path(file).read_text("utf-8")) for file in arguments.files))
        )
    else:
        results = []
        for number in arguments.numbers:
            results.append(run(number, dict(arguments.p), arguments.executed))
            print(
                number,
                results[-1]["seconds"],
                "s",
                (results[-1]["error"] or "done")[-400:],
                flush=True,
            )
            content = {"date": time.strftime("%Y-%m-%d"), "notebooks": results}
            Path(arguments.output).write_text(json.dumps(content, indent=1), encoding="utf-8")
        return int(any(result["error"] for result in results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
