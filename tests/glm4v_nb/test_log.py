"""The log of a run's stages, on simulated cards and on this machine."""

import json
from datetime import datetime

import pytest
import torch
from rig_fixtures import MIB, load

from glm4v_nb.log import logged_stage
from glm4v_nb.workload import Workload, make_prompt, prefill
from simgpu import Rig

KEYS = ["time", "stage", "provenance", "memory", "out_of_memory", "error"]


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_stage_becomes_one_line_in_the_order_run(tmp_path):
    rig, log = Rig("L4", 2), tmp_path / "stages.jsonl"
    with rig:
        with logged_stage(rig, "load", log):
            model = load()
        with logged_stage(rig, "prefill", log):
            prefill(model, make_prompt(model, Workload(images=0, text_tokens=8)))
    records = read(log)
    assert [record["stage"] for record in records] == ["load", "prefill"]
    for record, stage in zip(records, rig.stages, strict=True):
        assert list(record) == KEYS
        assert record["memory"] == [memory.to_dict() for memory in stage.memory]
        assert (record["provenance"], record["out_of_memory"], record["error"]) == (
            "simulated",
            None,
            None,
        )
        assert datetime.fromisoformat(record["time"]).tzinfo is not None


def test_the_block_is_given_the_stage_of_the_rig(tmp_path):
    rig = Rig("L4")
    with rig, logged_stage(rig, "tensor", tmp_path / "log") as stage:
        torch.empty(MIB, dtype=torch.uint8, device="cuda:0")
    assert stage is rig.stages[-1]
    assert stage.memory[0].peak_allocated_bytes == MIB


def test_a_stage_that_runs_out_of_memory_is_logged_with_the_message_and_the_error_goes_on(tmp_path):
    rig, log = Rig("L4"), tmp_path / "log"
    with rig, pytest.raises(torch.OutOfMemoryError) as caught:
        with logged_stage(rig, "too much", log):
            torch.empty(30 * 2**30, dtype=torch.uint8, device="cuda:0")
    (record,) = read(log)
    assert record["out_of_memory"] == str(caught.value)
    assert record["error"] is None
    assert record["memory"][0]["capacity_bytes"] == rig.card.total_bytes


def test_a_stage_that_ends_by_another_error_is_logged_with_it(tmp_path):
    rig, log = Rig.here(), tmp_path / "log"
    with pytest.raises(ValueError, match="wrong picture"), logged_stage(rig, "answer", log):
        raise ValueError("wrong picture")
    (record,) = read(log)
    assert (record["error"], record["out_of_memory"]) == ("ValueError: wrong picture", None)


def test_this_machine_is_logged_as_measured(tmp_path):
    rig, log = Rig.here(), tmp_path / "log"
    with rig, logged_stage(rig, "nothing", log):
        pass
    (record,) = read(log)
    assert record["provenance"].startswith("measured on ")
    assert all(memory["allocated_bytes"] >= 0 for memory in record["memory"])


def test_a_log_that_exists_is_continued(tmp_path):
    log = tmp_path / "log"
    for name in ("yesterday", "today"):
        with logged_stage(Rig.here(), name, log):
            pass
    assert [record["stage"] for record in read(log)] == ["yesterday", "today"]


def test_a_log_that_cannot_be_written_is_refused_before_the_stage_begins(tmp_path):
    rig = Rig.here()
    with pytest.raises(FileNotFoundError), logged_stage(rig, "load", tmp_path / "missing" / "log"):
        raise AssertionError("the stage began")
    assert rig.stages == []
