"""Notebooks 01 to 03 on a machine with two GPUs. The machine is simulated here, and ``Rig`` takes
it for a real one."""

import io
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import matplotlib
import nbformat
import pytest
import torch

from simgpu import Rig
from simgpu.simulated import SimulatedRig

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@contextmanager
def machine(card: str, count: int):
    """``torch.cuda`` as on a machine with such GPUs; nothing in it says that a rig makes it up."""
    gpus = SimulatedRig(card, count)
    with gpus:
        Rig.active = None
        try:
            yield gpus
        finally:
            Rig.active = gpus


def run(name: str, monkeypatch) -> tuple[str, dict]:
    """What a notebook prints, and its variables at the end; its pictures are drawn and thrown
    away."""
    monkeypatch.setattr(matplotlib, "get_backend", lambda: "agg")
    notebook = nbformat.read(next(NOTEBOOKS.glob(f"{name}_*.ipynb")), as_version=4)
    variables: dict = {"__name__": "__main__"}
    printed = io.StringIO()
    with redirect_stdout(printed):
        for cell in notebook.cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, name, "exec"), variables)
    return printed.getvalue(), variables


@pytest.mark.parametrize("name", ["01", "02", "03"])
def test_a_notebook_runs_unchanged_on_two_larger_gpus_and_says_that_they_are_capped(
    name, monkeypatch
):
    with machine("H100", 2) as gpus:
        printed, variables = run(name, monkeypatch)
        assert torch.cuda.device_count() == 2
        assert all(allocator.fraction in (None, 1.0) for allocator in gpus.allocators), (
            "the caps are taken off"
        )
    assert "H100 80GB HBM3 capped to 21.79 GiB, as an NVIDIA L4" in printed
    if name == "02":
        # The same three deaths: the cards are capped to what an L4, an RTX 5090 and an A100-40
        # have.
        assert [
            stage.name for rig in variables["deaths"].values() for stage in rig.stages[-1:]
        ] == ["load", "prefill", "backward"]
        assert "total capacity of 79.18 GiB" in printed
        assert "21.79 GiB allowed" in printed
        assert "30.76 GiB allowed" in printed
    if name == "03":
        assert "... decoder layers per card: {0: 9, 1: 31}" in printed, "auto sees two L4"
        assert "Out of memory" not in printed
