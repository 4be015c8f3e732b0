"""The history of allocations, for PyTorch's memory viewer."""

import inspect
import pickle

import pytest
import torch
from torch.cuda import _memory_viz

from simgpu import Rig


def allocate_and_free():
    line = inspect.currentframe().f_lineno + 1
    tensor = torch.zeros(3 * 2**20, device="cuda:1")
    del tensor
    return line


@pytest.mark.parametrize("segments", [False, True], ids=["fixed", "expandable"])
def test_a_dumped_history_opens_in_the_viewer_and_names_the_line_that_asked(segments, tmp_path):
    rig = Rig.simulated("L4", 2, f"expandable_segments:{segments}")
    with rig:
        torch.cuda.memory._record_memory_history(max_entries=1000)
        line = allocate_and_free()
        torch.cuda.empty_cache()
        torch.cuda.memory._dump_snapshot(tmp_path / "snapshot.pickle")
    snapshot = pickle.loads((tmp_path / "snapshot.pickle").read_bytes())
    events = snapshot["device_traces"][1]
    makes, gives = ("map", "unmap") if segments else ("alloc", "free")
    actions = [f"segment_{makes}", "alloc", "free_requested", "free_completed", f"segment_{gives}"]
    assert [event["action"] for event in events] == actions
    assert [event["size"] for event in events[1:4]] == [12 * 2**20] * 3
    assert snapshot["device_traces"][0] == []
    frame = next(each for each in events[1]["frames"] if each["filename"] == __file__)
    assert (frame["name"], frame["line"]) == ("allocate_and_free", line)
    assert "12.0MiB" in _memory_viz.trace(snapshot)
    assert "device_traces" not in _memory_viz.segment_plot(snapshot)  # an HTML page


def test_a_history_ends_with_the_failure_and_is_gone_when_switched_off():
    with Rig.simulated("L4"):
        torch.cuda.memory._record_memory_history(max_entries=2)
        kept = torch.zeros(4, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(2**36, device="cuda")
        snapshot = torch.cuda.memory._snapshot()
        assert [each["action"] for each in snapshot["device_traces"][0]] == ["alloc", "oom"]
        block = snapshot["segments"][0]["blocks"][0]
        assert any(frame["filename"] == __file__ for frame in block["frames"])
        torch.cuda.memory._record_memory_history(None)
        assert torch.cuda.memory._snapshot()["device_traces"] == [[]]
    del kept


def test_a_fraction_of_nothing_is_nothing():
    with Rig.simulated("L4"):
        assert torch.cuda.get_per_process_memory_fraction() == 1.0
        torch.cuda.set_per_process_memory_fraction(0.0)
        assert torch.cuda.get_per_process_memory_fraction() == 0.0
