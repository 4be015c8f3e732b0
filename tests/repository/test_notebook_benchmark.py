"""benchmarks/notebooks.py: what it writes down of a notebook's cards, and what it says of two such
files."""

import copy
from pathlib import Path

import nbformat
import pytest
from benchmark_program import load_benchmark
from rig_fixtures import MIB


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    module = load_benchmark("notebooks")
    monkeypatch.setattr(module, "NOTEBOOKS", tmp_path)
    return module


def write(folder: Path, *cells: str):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    nbformat.write(notebook, folder / "01_small.ipynb")


def test_every_stage_of_every_rig_is_written_down_also_of_a_failed_one(benchmark, tmp_path):
    write(
        tmp_path,
        "size = 1",
        "import torch\nfrom simgpu import Rig\nunused, rig = Rig('L4'), Rig('L4', 2)",
        "with rig, rig.stage('first'):\n    kept = torch.empty(size * 2**20, dtype=torch.uint8,"
        " device='cuda:1')",
        "try:\n    with rig, rig.stage('second'):\n        torch.empty(2**40, device='cuda')\n"
        "except torch.OutOfMemoryError:\n    del rig",
    )
    result = benchmark.run("01", {"size": "3", "unknown": "1"}, str(tmp_path / "executed"))
    assert result["error"] is None
    assert result["parameters"] == {"size": 3}
    (rig,) = result["rigs"]
    assert rig["provenance"] == "simulated"
    first, second = rig["stages"]
    assert (first["stage"], first["peak_allocated_bytes"], first["out_of_memory"]) == (
        "first",
        [0, 3 * MIB],
        None,
    )
    assert second["out_of_memory"].startswith("CUDA out of memory. Tried to allocate 4096.00 GiB")
    assert (tmp_path / "executed" / "01_small.ipynb").is_file()


def test_a_cache_that_cannot_be_written_is_not_left_behind(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(Path(benchmark.__file__).parent)

    def full(directory):
        Path(directory).mkdir(parents=True)
        raise OSError("No space left on device")

    monkeypatch.setattr("memory.write_checkpoint", full)
    for _ in range(2):  # the second time, too, it is the disk that is named
        with pytest.raises(OSError, match="No space left"):
            benchmark.cache()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / benchmark.REPOSITORY).mkdir()
    with pytest.raises(SystemExit, match="exists already; nothing was written"):
        benchmark.cache()


def test_a_notebook_that_fails_says_so(benchmark, tmp_path):
    write(tmp_path, "size = 1", "1 / 0")
    result = benchmark.run("01", {}, "")
    assert "ZeroDivisionError" in result["error"]
    assert result["rigs"] == []


def stage(size: int, out_of_memory=None) -> dict:
    return {
        "stage": "prefill",
        "peak_allocated_bytes": [size],
        "peak_reserved_bytes": [size],
        "out_of_memory": out_of_memory,
    }


def test_two_files_are_compared_where_one_is_measured(benchmark, capsys):
    simulated = {
        "notebooks": [
            {
                "notebook": "01",
                "parameters": {},
                "error": None,
                "rigs": [{"provenance": "simulated", "stages": [stage(5 * MIB)]}] * 2,
            }
        ]
    }
    measured = copy.deepcopy(simulated)
    assert benchmark.compare(measured, simulated) == 0
    assert "prefill" not in capsys.readouterr().out
    measured["notebooks"][0]["rigs"][1] = {
        "provenance": "measured on one",
        "stages": [stage(7 * MIB)],
    }
    assert benchmark.compare(measured, simulated) == 0
    assert capsys.readouterr().out.count("7.0     -2.0") == 2
    measured["notebooks"][0]["rigs"][1]["stages"] = [stage(7 * MIB, "CUDA out of memory")]
    assert benchmark.compare(measured, simulated) == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_a_notebook_is_compared_with_a_run_of_the_same_parameters(benchmark, capsys):
    def result(provenance, size, **parameters):
        rig = {"provenance": provenance, "stages": [stage(size * MIB)]}
        return {"notebook": "01", "parameters": parameters, "error": None, "rigs": [rig]}

    simulated = {"notebooks": [result("simulated", 5, count=1), result("simulated", 6, count=2)]}
    measured = {"notebooks": [result("measured", 7, count=count) for count in (1, 3)]}
    assert benchmark.compare(measured, simulated) == 0
    printed = capsys.readouterr().out
    assert printed.count("-2.0") == 2
    assert printed.count("not simulated") == 1
