"""The memory monitor on simulated cards, on this machine and on a faked GPU; its file, its picture,
its bars."""

import gc
import itertools
import json
import os
import threading
import time
import weakref
from types import SimpleNamespace

import pynvml
import pytest
import torch
from rig_fixtures import MIB, load
from transformers import DynamicCache
from waiting import until

from glm4v_nb.plots import memory_by_purpose, plot_timeline
from glm4v_nb.widgets.memory_bars import MemoryBars
from glm4v_nb.workload import Workload, decode, make_prompt, prefill
from simgpu import Rig, monitor
from simgpu import readings as cards
from simgpu.monitor import Monitor, read_samples

PARTS = ("weights_bytes", "kv_cache_bytes", "workspace_bytes", "activations_bytes")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "samples.jsonl"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny model loaded and run on two simulated cards: the rig, and what was sampled."""
    path = tmp_path_factory.mktemp("monitor") / "samples.jsonl"
    rig = Rig("L4", 2)
    with rig, pytest.MonkeyPatch.context() as patch, Monitor(rig, path):
        patch.setattr(monitor, "STEP_BYTES", 1024)
        patch.setattr(monitor, "PEAK_BYTES", 1)
        with rig.stage("load"):
            model = load()
        with rig.stage("prefill"):
            prompt = make_prompt(model, Workload(images=0, text_tokens=8))
            outputs = prefill(model, prompt)
        with rig.stage("decode"):
            decode(rig, model, prompt, outputs, 8)
    return rig, read_samples(path)


def test_samples_carry_the_names_of_the_stages_they_were_taken_in(run):
    assert {tuple(sample["stages"]) for sample in run[1]} >= {("load",), ("prefill",), ("decode",)}
    assert run[1][0]["stages"] == run[1][-1]["stages"] == []


def test_a_stage_within_a_stage_is_named_after_it(path):
    rig = Rig("L4")
    with rig, Monitor(rig, path), rig.stage("request"), rig.stage("prefill"):
        torch.zeros(1000, device="cuda")
    assert ["request", "prefill"] in [sample["stages"] for sample in read_samples(path)]


def test_every_card_is_in_every_sample_and_both_are_seen_to_fill(run):
    for sample in run[1]:
        assert [card["index"] for card in sample["cards"]] == [0, 1]
    assert all(run[1][-1]["cards"][index]["allocated_bytes"] > 0 for index in (0, 1))


def test_on_simulated_cards_no_peak_of_a_stage_is_missed(run):
    rig, samples = run
    for stage in rig.stages[1:]:
        for memory in stage.memory:
            seen = [
                s["cards"][memory.index]["allocated_bytes"]
                for s in samples
                if s["stages"] == [stage.name]
            ]
            assert max(seen) == memory.peak_allocated_bytes


def test_a_peak_that_is_the_last_thing_of_a_stage_is_among_its_samples(path):
    rig = Rig("L4")
    with rig, Monitor(rig, path):
        with rig.stage("fill"):
            kept = torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")
        with rig.stage("rest"):
            del kept
    fill = [sample for sample in read_samples(path) if sample["stages"] == ["fill"]]
    assert (
        fill[-1]["cards"][0]["allocated_bytes"]
        == rig.stages[0].memory[0].peak_allocated_bytes
        == 3 * MIB
    )


def test_a_layers_peak_is_seen_also_where_an_earlier_layer_was_as_high(path):
    rig = Rig("L4")
    with rig, Monitor(rig, path), rig.stage("layers"):
        for _ in range(3):
            narrow = torch.empty(100 * MIB, dtype=torch.uint8, device="cuda")
            wide = torch.empty(200 * MIB, dtype=torch.uint8, device="cuda")
            del wide, narrow
    seen = [sample["cards"][0]["allocated_bytes"] for sample in read_samples(path)]
    assert seen.count(300 * MIB) == 3


def test_the_parts_of_a_card_sum_to_what_is_allocated_reserved_and_used(run):
    for sample in run[1]:
        for card in sample["cards"]:
            parts = memory_by_purpose(card)
            assert sum(card[name] for name in PARTS) == card["allocated_bytes"]
            inside = sum(
                size
                for name, size in parts.items()
                if name not in ("CUDA context", "other processes")
            )
            assert inside == card["reserved_bytes"]
            assert sum(parts.values()) == card["used_bytes"]


def test_nobody_else_is_on_a_simulated_card_also_where_kernels_and_driver_take_a_part(path):
    rig = Rig("H100")
    with rig, Monitor(rig, path):
        torch.zeros(8, 8, device="cuda") @ torch.zeros(8, 8, device="cuda")
    (card,) = read_samples(path)[-1]["cards"]
    assert (card["own_bytes"], card["others_bytes"]) == (card["used_bytes"], 0)
    assert memory_by_purpose(card)["CUDA context"] == rig.card.outside_bytes


def test_weights_are_what_the_load_left_and_the_kv_cache_grows_with_decoding(run):
    rig, samples = run
    end_of_load = [memory.allocated_bytes for memory in rig.stages[0].memory]
    decoding = [sample["cards"] for sample in samples if sample["stages"] == ["decode"]]
    assert [card["weights_bytes"] for card in decoding[0]] == end_of_load
    first, last = (
        [card["kv_cache_bytes"] for card in each] for each in (decoding[0], decoding[-1])
    )
    assert 0 < sum(first) < sum(last)


def test_a_simulated_card_is_the_same_with_and_without_a_monitor(path):
    def peaks(watched):
        rig = Rig("L4", 2)
        with rig, rig.stage("all"):
            if watched:
                with Monitor(rig, path):
                    model = load()
                    prefill(model, make_prompt(model, Workload(images=0, text_tokens=8)))
            else:
                model = load()
                prefill(model, make_prompt(model, Workload(images=0, text_tokens=8)))
        assert [allocator.listeners for allocator in rig.allocators] == [[], []]
        return [memory.to_dict() for memory in rig.stages[0].memory]

    assert peaks(True) == peaks(False)


def test_an_out_of_memory_error_passes_through_and_the_full_card_has_been_sampled(path):
    rig, kept = Rig("L4"), []
    with rig, pytest.raises(torch.OutOfMemoryError), Monitor(rig, path), rig.stage("fill"):
        while True:
            kept.append(torch.empty(2**30, dtype=torch.uint8, device="cuda"))
    full = [sample for sample in read_samples(path) if sample["stages"] == ["fill"]][-1]
    assert full["cards"][0]["allocated_bytes"] == len(kept) * 2**30


def test_a_thread_samples_this_machine_at_the_set_rate(path):
    rig, begin = Rig.here(), time.monotonic()
    with Monitor(rig, path, 0.02) as watch, rig.stage("wait"):
        until(lambda: watch.samples >= 8)
    # And one at each end of the block and of the stage. A busy machine may be late, but a sampler
    # must not run ahead of its rate.
    assert 8 < watch.samples == len(read_samples(path)) <= 4 + (time.monotonic() - begin) / 0.02
    assert ["wait"] in [sample["stages"] for sample in read_samples(path)]
    assert not [thread for thread in threading.enumerate() if thread.name == "simgpu monitor"]


@pytest.fixture
def failed(monkeypatch):
    """This machine can be read once; set when it was tried again."""
    read, reads, failed = cards.MachineReadings.read, itertools.count(), threading.Event()

    def read_once(self):
        if next(reads):
            failed.set()
            failing(self)
        return read(self)

    monkeypatch.setattr(cards.MachineReadings, "read", read_once)
    return failed


def test_an_error_of_the_sampling_thread_reaches_the_caller(path, failed):
    rig = Rig.here()
    with pytest.raises(
        RuntimeError, match="stopped after 1 samples, by OSError: the driver is gone"
    ) as raised:
        with Monitor(rig, path, 0.01):
            assert failed.wait(60)
    assert isinstance(raised.value.__cause__, OSError)
    assert len(read_samples(path)) == 1


def test_an_error_while_sampling_simulated_cards_does_not_end_the_program_but_is_raised_after_it(
    path, monkeypatch
):
    rig, made = Rig("L4"), []
    with pytest.raises(RuntimeError, match="OSError: the driver is gone"), rig, Monitor(rig, path):
        monkeypatch.setattr(cards.SimulatedReadings, "read", failing)
        with rig.stage("work"):
            made.append(torch.zeros(10, device="cuda"))
    assert len(made) == 1


def test_an_error_of_the_program_is_not_replaced_by_one_of_the_monitor(path, failed):
    with pytest.raises(KeyError) as raised, Monitor(Rig.here(), path, 0.01):
        assert failed.wait(60)
        raise KeyError("the program's own")
    assert "the driver is gone" in raised.value.__notes__[0]


def failing(self):
    raise OSError("the driver is gone")


def test_an_interval_that_is_not_positive_is_refused(path):
    with pytest.raises(ValueError, match="interval_seconds is 0; expected seconds above 0"):
        Monitor(Rig.here(), path, 0)


def test_every_line_is_json_and_a_second_monitor_appends(path):
    for _ in range(2):
        with Monitor(Rig("L4"), path):
            pass
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == read_samples(path)
    assert len(lines) == 4


def test_a_last_line_that_was_cut_off_is_left_out(path):
    with Monitor(Rig("L4"), path):
        pass
    text = path.read_text(encoding="utf-8")
    path.write_text(text[:-40], encoding="utf-8")
    assert len(read_samples(path)) == 1


@pytest.mark.parametrize(
    "line", ["{", '{"stage": "load"}', "3"], ids=["no JSON", "another log", "a number"]
)
def test_a_line_that_is_no_sample_is_refused_with_its_number(path, line):
    with Monitor(Rig("L4"), path):
        pass
    path.write_text(path.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"samples.jsonl, line 3: .* Expected one sample"):
        read_samples(path)


def test_a_missing_file_is_named(path):
    with pytest.raises(
        FileNotFoundError, match=r"samples.jsonl is no file. Expected what a Monitor wrote"
    ):
        read_samples(path)


def test_the_monitor_keeps_no_tensor_and_no_cache_alive(path):
    rig, cache = Rig.here(), DynamicCache()
    cache.update(torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8, 16), 0)
    seen = []
    with Monitor(rig, path, 0.01, cache=cache, on_sample=seen.append):
        until(lambda: seen)
        references = [weakref.ref(each) for each in (cache, cache.layers[0].keys)]
        del cache
        gc.collect()
        # A sample in progress may hold a layer for microseconds.
        until(lambda: not any(reference() is not None for reference in references))
    sizes = [sample["cards"][0]["kv_cache_bytes"] for sample in seen]
    assert (sizes[0], sizes[-1]) == (2 * 2 * 8 * 16 * 4, 0)


def test_tensors_on_simulated_cards_die_as_without_a_monitor(path):
    rig = Rig("L4")
    with rig, Monitor(rig, path):
        tensor = torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda")
        more = torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda")
        assert rig.memory()[0].allocated_bytes == 128 * MIB
        del tensor, more
        assert rig.memory()[0].allocated_bytes == 0


def allocated(path) -> int:
    return max(sample["cards"][0]["allocated_bytes"] for sample in read_samples(path))


def pulse(mebibytes):
    """Take so much of a card and give it back."""
    filled = torch.empty(mebibytes * MIB, dtype=torch.uint8, device="cuda")
    torch.empty(512, dtype=torch.uint8, device="cuda")  # a sample is taken before this request
    del filled


def test_of_two_monitors_at_once_each_sees_everything_in_its_own_block(tmp_path):
    rig, outer, inner = Rig("L4"), tmp_path / "outer", tmp_path / "inner"
    with rig, Monitor(rig, outer):
        pulse(64)
        with Monitor(rig, inner):
            pulse(256)
            assert allocated(outer) == allocated(inner) == 256 * MIB
        pulse(1024)
    assert (allocated(inner), allocated(outer)) == (256 * MIB, 1024 * MIB)
    assert rig.allocators[0].listeners == []


@pytest.mark.parametrize("first", [0, 1])
def test_two_monitors_may_end_in_any_order(tmp_path, first):
    rig = Rig("L4")
    watches = [Monitor(rig, tmp_path / name) for name in "ab"]
    with rig:
        for watch in watches:
            watch.__enter__()
        pulse(64)
        watches[first].__exit__(None, None, None)
        pulse(256)
        watches[1 - first].__exit__(None, None, None)
        pulse(1024)
    assert allocated(watches[first].path) == 64 * MIB
    assert allocated(watches[1 - first].path) == 256 * MIB


def test_two_monitors_of_real_devices_at_once(tmp_path):
    rig = Rig.here()
    with Monitor(rig, tmp_path / "a", 0.02) as outer:
        with Monitor(rig, tmp_path / "b", 0.02) as inner, rig.stage("wait"):
            until(lambda: inner.samples > 2)
        until(lambda: outer.samples > inner.samples)


@pytest.fixture
def faked_gpu(monkeypatch):
    """One GPU of 24,000 MiB of which 3000 are used, as PyTorch and NVML would tell; processes may
    be set."""
    allocator = {
        "allocated_bytes": {"all": {"current": 900 * MIB, "peak": 950 * MIB}},
        "reserved_bytes": {"all": {"current": 1000 * MIB, "peak": 1000 * MIB}},
    }
    properties = SimpleNamespace(name="Fake", total_memory=24_000 * MIB, uuid="1-2")
    for name, answer in (
        ("is_available", True),
        ("is_initialized", True),
        ("device_count", 1),
        ("get_device_name", "Fake"),
        ("get_device_properties", properties),
        ("memory_stats_as_nested_dict", allocator),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    nvml = SimpleNamespace(processes=[], begun=0, ended=0)

    def begin():
        nvml.begun += 1

    def end():
        nvml.ended += 1

    monkeypatch.setattr(pynvml, "nvmlInit", begin)
    monkeypatch.setattr(pynvml, "nvmlShutdown", end)
    monkeypatch.setattr(
        pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: {"GPU-1-2": "handle"}[uuid]
    )
    figures = SimpleNamespace(used=3000 * MIB, free=21_000 * MIB)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda handle, version=None: figures)
    listed = "nvmlDeviceGetComputeRunningProcesses"
    monkeypatch.setattr(pynvml, listed, lambda handle: nvml.processes)
    return nvml


def process(pid, mebibytes):
    return SimpleNamespace(pid=pid, usedGpuMemory=None if mebibytes is None else mebibytes * MIB)


def sampled(path):
    rig = Rig.here()
    with Monitor(rig, path, 60):
        pass
    return read_samples(path)[-1]["cards"][0]


def test_bytes_of_other_processes_are_what_nvml_counts_beside_this_one(faked_gpu, path):
    faked_gpu.processes = [process(os.getpid(), 1600), process(os.getpid() + 1, 1400)]
    card = sampled(path)
    assert (card["used_bytes"], card["own_bytes"]) == (3000 * MIB, 1600 * MIB)
    assert card["others_bytes"] == 1400 * MIB
    parts = memory_by_purpose(card)
    assert (parts["other processes"], parts["CUDA context"]) == (1400 * MIB, 600 * MIB)
    assert sum(parts.values()) == 3000 * MIB


@pytest.mark.parametrize(
    "listed", [[(0, None)], [(1, 1400)], []], ids=["without bytes", "only others", "nothing"]
)
def test_where_nvml_does_not_tell_this_process_from_others_the_sample_says_null(
    faked_gpu, path, listed
):
    faked_gpu.processes = [process(os.getpid() + offset, size) for offset, size in listed]
    card = sampled(path)
    assert (card["own_bytes"], card["others_bytes"]) == (None, None)
    assert memory_by_purpose(card)["outside PyTorch"] == 2000 * MIB


def test_nvml_is_begun_once_for_all_samples_and_ended(faked_gpu, path):
    rig = Rig.here()
    with Monitor(rig, path, 0.01) as watch:
        until(lambda: watch.samples > 2)
    assert (faked_gpu.begun, faked_gpu.ended) == (1, 1)


def test_weights_on_a_gpu_are_what_was_allocated_when_the_load_ended(faked_gpu, path):
    stage = SimpleNamespace(name="load", memory=[SimpleNamespace(allocated_bytes=700 * MIB)])
    rig = Rig.here()
    rig.stages.append(stage)
    with Monitor(rig, path, 60):
        pass
    card = read_samples(path)[-1]["cards"][0]
    assert [card[name] for name in PARTS] == [700 * MIB, 0, None, 200 * MIB]
    assert card["peak_allocated_bytes"] == 950 * MIB


def test_the_timeline_has_a_panel_for_every_card_its_capacity_and_the_stages_names(run):
    figure = plot_timeline(run[1], title="A run")
    assert len(figure.axes) == 2
    capacity = run[1][0]["cards"][0]["capacity_bytes"] / 2**30
    for axes in figure.axes:
        assert capacity in [line.get_ydata()[0] for line in axes.lines]
    assert [text.get_text() for text in figure.axes[0].texts] == ["load", "prefill", "decode"]
    assert "simulated" in figure.axes[-1].get_xlabel()


def test_the_timeline_draws_a_peak_of_a_single_sample_among_thousands(run):
    flat = run[1][-1] | {"stages": ["work"]}
    card = flat["cards"][0]
    more = {
        name: card[name] + 2**30
        for name in ("activations_bytes", "allocated_bytes", "reserved_bytes")
    }
    peak = card["activations_bytes"] / 2**30 + 1
    samples = [flat | {"event": event} for event in range(5000)]
    samples[3210] |= {"cards": [card | more, flat["cards"][1]]}
    figure = plot_timeline(samples, only=("activations",))
    tops = [
        path.get_extents().y1 for each in figure.axes[0].collections for path in each.get_paths()
    ]
    assert max(tops) == pytest.approx(peak)


def test_a_timeline_of_real_devices_counts_seconds(path):
    rig = Rig.here()
    with Monitor(rig, path, 0.02), rig.stage("wait"):
        time.sleep(0.1)
    figure = plot_timeline(read_samples(path))
    assert figure.axes[0].get_xlabel().startswith("seconds · measured on")
    assert 0.1 <= figure.axes[0].get_xlim()[1] < 5


@pytest.mark.parametrize(
    "count, message", [(0, "There are no samples"), (2, "of several processes")]
)
def test_a_timeline_of_nothing_or_of_several_processes_is_refused(run, count, message):
    samples = [run[1][0] | {"process": number} for number in range(count)]
    with pytest.raises(ValueError, match=message):
        plot_timeline(samples)


def test_the_bars_follow_the_monitor_and_name_the_stage(path):
    rig, kept = Rig("L4", 2), []
    bars = MemoryBars(rig)
    assert "GPU 1" in bars._bars.value
    with rig, Monitor(rig, path, on_sample=bars.update), rig.stage("fill <1>"):
        kept.append(torch.zeros(2**30, dtype=torch.uint8, device="cuda"))
        kept.append(torch.zeros(2**30, dtype=torch.uint8, device="cuda"))
        assert "fill &lt;1&gt;" in bars._stage.value
    bars.show()
    assert "2.00 GiB of 22.03 GiB" in bars._bars.value
    assert "between stages" in bars._stage.value
    bars.close()
