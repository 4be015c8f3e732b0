"""Execute notebooks in place, so that their stored outputs come from a real run; for whoever
changes one.

    python tools/refresh_notebooks.py [01 02 ...]

Nothing of this machine is stored; `make validate` then says whether a notebook keeps the other
rules, too.
"""

import base64
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from nbsweep.registry import load_registry

ROOT = Path(__file__).parents[1]


def refresh(path, timeout_seconds: int):
    """Run one notebook and store its outputs without execution times or other traces of the
    machine."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=timeout_seconds,
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
    ).execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


def _joined(outputs: list) -> list:
    """Text that was printed piece by piece as one output, which is how the notebook showed it."""
    joined = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def last_picture(path) -> bytes:
    """The PNG of a notebook's last plot."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    outputs = [
        output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})
    ]
    return base64.b64decode(outputs[-1].data["image/png"])


def main():
    numbers = sys.argv[1:]
    lessons = load_registry(ROOT / "notebooks" / "registry.toml")
    targets = load_registry(ROOT / "sweeps" / "targets" / "registry.toml")
    for registry in (lessons, targets):
        for entry in registry.notebook:
            if not numbers or entry.number in numbers:
                print(f"running {entry.file} ...", flush=True)
                refresh(registry.folder / entry.file, entry.timeout_seconds)
    # The README shows what notebook 02 drew.
    picture = last_picture(lessons.folder / "02_run_out_of_memory.ipynb")
    (ROOT / "docs" / "out_of_memory.png").write_bytes(picture)


if __name__ == "__main__":
    main()
