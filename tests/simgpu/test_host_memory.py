"""Host memory of loading: the simulator's count, what it rests on in the real loader, and stored
measurements."""

import copy
import gc
import json
import mmap
import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from benchmark_program import load_benchmark
from rig_fixtures import GOLDEN, MIB, load, write_config
from transformers import AutoModelForCausalLM, core_model_loading

from glm4v_nb.fit import fit
from glm4v_nb.workload import Workload
from simgpu import HostMemory, Rig
from simgpu.device import fake_mode
from simgpu.host import LOADER_THREADS

ROOT = Path(__file__).parents[2]
STORED = sorted((ROOT / "benchmarks" / "results").glob("host_memory_*.json"))
TOWER_ON_CPU = {"vision_tower": "cpu", "language_model": 0, "lm_head": 0}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The tiny golden configuration in float16, and no weights."""
    return write_config(tmp_path_factory.mktemp("tiny"), torch_dtype="float16")


@pytest.fixture(scope="module")
def sizes():
    """Bytes of every official tensor of it in float16, but for a buffer that no loader takes."""
    index = json.loads((GOLDEN / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for file in set(index.values()):
        header = read_header(GOLDEN / file)
        found |= {
            name: 2 * torch.Size(header[name]["shape"]).numel()
            for name in header
            if "inv_freq" not in name
        }
    return found


def read_header(path):
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: value for name, value in header.items() if name != "__metadata__"}


def loaded(source, device_map, dtype) -> HostMemory:
    with Rig.simulated("L4", 1) as rig:
        load(source, device_map, dtype)
    return rig.host.memory


def test_weights_kept_on_the_cpu_in_their_own_type_are_views_and_are_not_read(directory, sizes):
    host = loaded(directory, "cpu", torch.float16)
    assert host == HostMemory(0, 0, 0, 0, 0, view_bytes=sum(sizes.values()))


@pytest.mark.parametrize(("dtype", "growth"), [(torch.float32, 2), (torch.bfloat16, 1)])
def test_another_type_on_the_cpu_is_a_copy_that_stays_and_no_file_is_mapped_any_more(
    directory, sizes, dtype, growth
):
    host, total = loaded(directory, "cpu", dtype), sum(sizes.values())
    converted = growth * total
    assert host == HostMemory(converted, converted, converted, total, file_bytes=0, view_bytes=0)


def test_weights_for_a_card_in_their_own_type_are_read_from_the_files_and_leave_nothing(
    directory, sizes
):
    host = loaded(directory, {"": 0}, torch.float16)
    assert host == HostMemory(
        0, 0, 0, peak_file_bytes=sum(sizes.values()), file_bytes=0, view_bytes=0
    )


def test_weights_for_a_card_in_another_type_are_converted_one_per_thread(directory, sizes):
    host = loaded(directory, {"": 0}, torch.float32)
    largest = sorted((2 * size for size in sizes.values()), reverse=True)
    assert host == HostMemory(
        sum(largest[:4]), largest[0], 0, sum(sizes.values()), file_bytes=0, view_bytes=0
    )


def test_conversions_for_a_card_come_on_top_of_what_stays_on_the_cpu(directory, sizes):
    host = loaded(directory, TOWER_ON_CPU, torch.float32)
    tower = sum(size for name, size in sizes.items() if name.startswith("transformer.vision"))
    rest = sorted(
        (2 * size for name, size in sizes.items() if not name.startswith("transformer.vision")),
        reverse=True,
    )
    assert host.anonymous_bytes == 2 * tower
    assert host.peak_anonymous_bytes == 2 * tower + sum(rest[:4])
    # With one thread the largest for the card, the embedding and the head, come before the tower.
    assert (
        max(2 * tower, rest[0]) <= host.sequential_peak_anonymous_bytes < host.peak_anonymous_bytes
    )


def test_what_the_loader_drops_again_counts_at_the_peak_only():
    with fake_mode():
        weight = torch.empty(2**20, dtype=torch.float16, device="cpu")
    with Rig.simulated("L4", 1) as rig, rig.host.loading():
        rig.host.map({"weight": weight}, {})
        both = weight.float(), weight.double()
        del both
        kept = weight.float()
    assert kept.shape == weight.shape
    assert rig.host.memory == HostMemory(12 * MIB, 12 * MIB, 4 * MIB, 2 * MIB, 2 * MIB, 2 * MIB)


def test_an_offloaded_module_keeps_the_pages_of_its_own_files_only(tmp_path, sizes):
    directory = write_config(tmp_path, torch_dtype="float16")
    stray = "transformer.vision.linear_proj.norm1.bias"
    places = {
        name: "tower.safetensors"
        if name.startswith("transformer.vision") and name != stray
        else "rest.safetensors"
        for name in sizes
    }
    tower = sum(size for name, size in sizes.items() if name.startswith("transformer.vision"))
    rest = sum(sizes.values()) - tower

    def measured():
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        return loaded(directory, TOWER_ON_CPU, torch.float16)

    # One tensor of the tower lies in the other file, which therefore stays mapped with all that was
    # read of it.
    assert measured() == HostMemory(
        0, 0, 0, peak_file_bytes=rest, file_bytes=rest, view_bytes=tower
    )
    places[stray] = "tower.safetensors"
    assert measured() == HostMemory(0, 0, 0, peak_file_bytes=rest, file_bytes=0, view_bytes=tower)


def test_a_load_that_fails_has_no_figure_and_the_next_one_starts_from_nothing(directory):
    with Rig.simulated("L4", 1) as rig:
        load(directory, "cpu", torch.float32)
        with pytest.raises(torch.OutOfMemoryError):
            AutoModelForCausalLM.from_pretrained(
                "zai-org/glm-4v-9b", device_map={"": 0}, dtype=torch.bfloat16
            )
        assert rig.host.memory is None
        load(directory, "cpu", torch.float16)
    assert rig.host.memory.peak_anonymous_bytes == 0


def test_a_damaged_index_is_named(tmp_path):
    directory = write_config(tmp_path)
    (directory / "model.safetensors.index.json").write_text("{}")
    with (
        Rig.simulated("L4", 1),
        pytest.raises(ValueError, match="index.json is not a safetensors index"),
    ):
        load(directory)


def test_fit_says_what_loading_takes():
    workload = Workload(images=0, text_tokens=8, new_tokens=0)
    assert fit("L4", 1, workload=workload).host is None, "the cards did not hold it"
    tower = 2 * 4_506_369_536
    offloaded = fit("L4", 1, device_map=TOWER_ON_CPU, workload=workload).host
    assert (offloaded.peak_anonymous_bytes, offloaded.view_bytes) == (0, tower)
    converted = fit("L4", 1, "float16", TOWER_ON_CPU, workload).host
    assert (converted.anonymous_bytes, converted.view_bytes) == (tower, 0)


# What the count rests on, in the real loader of the installed libraries.


def mappings(folder: Path) -> dict[range, str]:
    """The address ranges of this process at which files of a folder are mapped, and how."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    found = {}
    for line in lines:
        if line[-1].startswith(str(folder)):
            begin, end = (int(address, 16) for address in line[0].split("-"))
            found[range(begin, end)] = line[1]
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize(("dtype", "mapped"), [(torch.float32, True), (torch.bfloat16, False)])
def test_the_real_loader_keeps_private_views_of_the_files_unless_it_converts(
    dtype, mapped, tmp_path
):
    # A copy: other tests keep models of the original's files.
    folder = shutil.copytree(GOLDEN, tmp_path / "checkpoint")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu")
    places = mappings(folder)
    assert set(places.values()) == ({"rw-p"} if mapped else set())
    for name, parameter in model.named_parameters():
        assert any(parameter.data_ptr() in place for place in places) == mapped, name
    # One weight is enough to keep a file, and none is needed besides.
    last = model.lm_head.weight
    del model, parameter
    gc.collect()
    assert len(mappings(folder)) == mapped
    del last
    gc.collect()
    assert mappings(folder) == {}


def test_the_real_loader_has_no_more_threads_than_the_bound_assumes():
    assert core_model_loading.GLOBAL_WORKERS <= LOADER_THREADS


# The program that measures, and what it measured.


@pytest.fixture(scope="module")
def benchmark():
    return load_benchmark("host_memory")


def test_there_are_stored_measurements():
    assert STORED


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_every_measured_figure_is_what_the_simulator_says(benchmark, path):
    results = json.loads(path.read_text())
    figures = benchmark.compare(results)
    assert [figure for figure in figures if not figure.right] == []
    assert len(figures) >= 4 * 7
    stored = json.loads((path.parent / "simulated" / path.name).read_text())
    libraries = ("torch", "transformers", "accelerate")
    if all(version(name).startswith(stored["provenance"][name]) for name in libraries):
        assert [[one.case, one.name, one.least, one.most] for one in figures] == [
            list(one.values()) for one in stored["figures"]
        ], "python tools/accuracy.py --simulate stores them again"
    assert {figure.case.split(", ")[0] for figure in figures} == {"one file", "shards", "full size"}
    for case in results["cases"]:
        assert case["measured"]["samples"] > 0


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("peak_anonymous_bytes", -5 * MIB),
        ("peak_anonymous_bytes", 8 * MIB),
        ("loaded_anonymous_bytes", 8 * MIB),
        ("peak_file_bytes", -5 * MIB),
        ("peak_file_bytes", 16 * MIB),
        ("loaded_file_bytes", 16 * MIB),
    ],
)
def test_a_figure_that_is_too_far_away_is_noticed(benchmark, name, change):
    results = json.loads(STORED[0].read_text())
    chosen = [case for case in results["cases"] if case["case"]["dtype"] == "float32"][:1]
    results = copy.deepcopy(results | {"cases": chosen})
    results["cases"][0]["measured"][name] += change
    assert [figure.name for figure in benchmark.compare(results) if not figure.right] == [name]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_it_watches_a_real_process(benchmark):
    """A figure of this very process: what it maps and writes. Not what it allocates, for which the
    allocator may take pages that an earlier test's tensor has left to it."""
    before = benchmark.read_memory(os.getpid())
    with mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE) as held:
        for begin in range(0, len(held), MIB):
            held[begin : begin + MIB] = b"1" * MIB
        grown = benchmark.read_memory(os.getpid())
    assert grown["anonymous_bytes"] - before["anonymous_bytes"] == pytest.approx(
        64 * MIB, abs=4 * MIB
    )
    assert grown["file_bytes"] - before["file_bytes"] < 4 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_case_that_is_killed_while_it_loads_has_no_figures_and_stops_nothing(
    benchmark, monkeypatch, tmp_path
):
    program = tmp_path / "dies.py"
    program.write_text(
        "import os, sys; print('before', flush=True); sys.stdin.readline(); os.kill(os.getpid(), 9)"
    )
    monkeypatch.setattr(benchmark, "__file__", str(program))
    assert benchmark.watch(0, str(tmp_path)) is None
