"""How far the cards go: the largest batch, the longest context, the best device map, and the
frontier."""

from dataclasses import replace
from unittest import mock

import pytest
from rig_fixtures import GIB
from transformers import LlamaConfig

from glm4v_nb.fit import Deployment, fit
from glm4v_nb.workload import Workload
from simgpu import Rig, fitting
from simgpu.limits import (
    MOST_SAMPLES,
    Edge,
    Trials,
    bisect,
    frontier,
    frontier_tokens,
    largest_batch,
    limits,
    longest_context,
    recommend,
)

IMAGE = Workload(new_tokens=1)
RECIPE = Deployment().recipe


class Report:
    """Keeps what a progress display is told."""

    def __init__(self):
        self.steps, self.texts = 0, []

    def __call__(self, text=None):
        if text is None:
            self.steps += 1
        else:
            self.texts.append(text)


@pytest.fixture(scope="module")
def two_l4():
    return Trials(Deployment("L4", 2))


@pytest.fixture(scope="module", autouse=True)
def one_load_for_each_map():
    """A device map that several recommendations try is loaded once: its runs all start from the
    same bytes."""
    loaded = {}

    def trials(deployment, report):
        key = repr(deployment)
        if key not in loaded:
            loaded[key] = Trials(deployment, report)
        return loaded[key]

    with mock.patch("simgpu.limits.Trials", trials):
        yield


@pytest.mark.parametrize("edge", [0, 1, 2, 7, 100, 4095, 4096])
@pytest.mark.parametrize("guess", [1, 90, 4096])
def test_bisection_finds_the_edge_from_any_guess_and_has_run_both_sides_of_it(edge, guess):
    tried = set()

    def fits(size):
        tried.add(size)
        return size <= edge

    assert bisect(fits, 4096, guess) == edge
    assert {size for size in (edge, edge + 1) if 1 <= size <= 4096} <= tried
    assert len(tried) <= 30, "one by one would be up to 4096"


def test_bisection_of_nothing_finds_nothing():
    assert bisect(lambda size: True, 0, 5) == 0


def test_the_largest_batch_fits_and_one_more_does_not(two_l4):
    edge = largest_batch(two_l4, IMAGE)
    assert edge.limited_by == "memory"
    assert two_l4.run(replace(IMAGE, batch_size=edge.size)).fits
    assert not two_l4.run(replace(IMAGE, batch_size=edge.size + 1)).fits
    # A fresh load finds other holes in the cards' memory, which may be worth a sample or two.
    assert fit("L4", 2, workload=replace(IMAGE, batch_size=max(1, edge.size - 2))).fits
    assert not fit("L4", 2, workload=replace(IMAGE, batch_size=edge.size + 3)).fits


def test_the_largest_batch_takes_the_decode_steps_into_account():
    # Two layers that keep much of each position and take little to compute: quick to try.
    sizes = {"hidden_size": 8192, "num_attention_heads": 64, "intermediate_size": 64}
    wide = LlamaConfig(vocab_size=1000, num_hidden_layers=2, **sizes)
    trials = Trials(fitting.Deployment("L4", checkpoint=wide))
    short = trials.deployment.recipe.workload(text_tokens=16, new_tokens=1)
    long = replace(short, new_tokens=90)
    without, with_decode = largest_batch(trials, short).size, largest_batch(trials, long).size
    assert with_decode < without
    # 106 positions of 64 KiB for each sample, on a card of 22 GiB, and growing blocks leave holes.
    assert with_decode < 22 * GIB / (106 * 64 * 2**10)
    assert trials.run(replace(long, batch_size=with_decode)).fits
    assert trials.run(replace(long, batch_size=with_decode + 1)).oom.phase == "decode"


def test_the_search_for_a_batch_ends_and_says_so(two_l4):
    assert largest_batch(two_l4, IMAGE, most=3) == Edge(3, "search")


def test_the_longest_context_is_the_models_where_memory_allows_it(two_l4):
    assert longest_context(two_l4, Workload(new_tokens=1)) == Edge(8192 - 1602, "model")
    assert longest_context(two_l4, Workload(images=0, new_tokens=101)) == Edge(8192 - 100, "model")


def test_the_longest_context_of_a_batch_ends_where_memory_does(two_l4):
    workload = Workload(batch_size=32, images=0, new_tokens=1)
    edge = longest_context(two_l4, workload)
    assert edge.limited_by == "memory"
    assert two_l4.run(replace(workload, text_tokens=edge.size, new_tokens=0)).fits
    assert not two_l4.run(replace(workload, text_tokens=edge.size + 1, new_tokens=0)).fits


def test_every_run_starts_from_the_same_bytes_whatever_ran_before(two_l4):
    first = two_l4.run(Workload(text_tokens=40, new_tokens=3))
    two_l4.run(Workload(batch_size=200, new_tokens=1))
    two_l4.run(Workload(text_tokens=40, train=True))
    two_l4.run(Workload(text_tokens=41, new_tokens=3))
    assert two_l4._held() == two_l4.base
    for (allocated, _), device in zip(two_l4.base, first.devices, strict=True):
        # Nothing but the weights and the workspaces of the matrix library, tens of MiB.
        assert 0 < allocated - device.weights_bytes < 100 * 2**20
    del two_l4.runs[Workload(text_tokens=40, new_tokens=3)]
    again = two_l4.run(Workload(text_tokens=40, new_tokens=3))
    for late, early in zip(again.devices, first.devices, strict=True):
        # The training run has added the workspaces of a backward pass.
        assert late.peak_allocated_bytes == pytest.approx(
            early.peak_allocated_bytes, abs=100 * 2**20
        )


def test_something_left_on_the_cards_is_an_error_and_not_a_wrong_answer(two_l4, monkeypatch):
    from simgpu import fitting as module

    kept = []

    def leaking(rig, model, workload, recipe):
        with rig, rig.stage("prefill"):
            kept.append(module.torch.empty(2**22, device="cuda:0"))

    two_l4.run(Workload(images=0, text_tokens=1, new_tokens=1))
    monkeypatch.setattr(module, "run_workload", leaking)
    with pytest.raises(RuntimeError, match="Something still refers to tensors of the run"):
        two_l4.run(Workload(images=0, text_tokens=77))
    kept.clear()


def test_a_progress_display_is_told_of_every_run_but_a_remembered_one(two_l4, monkeypatch):
    report = Report()
    monkeypatch.setattr(two_l4, "report", report)
    for _ in range(2):
        two_l4.run(Workload(batch_size=3, images=0, text_tokens=9, new_tokens=1))
    assert report.texts == ["3 x 0 images, 9 tokens"]


def test_a_workload_that_has_run_is_not_run_again(two_l4, monkeypatch):
    from simgpu import fitting as module

    result = two_l4.run(IMAGE)
    monkeypatch.setattr(module, "run_workload", None)
    assert two_l4.run(replace(IMAGE)) is result


def test_weights_that_do_not_fit_leave_no_batch_no_context_and_no_map():
    report = Report()
    found = limits(Trials(Deployment("L4", 1), report), Workload(images=0, new_tokens=1))
    assert found.result.oom.phase == "load"
    assert found.largest_batch == found.longest_context == Edge(0, "memory")
    assert found.recommendation is None
    assert report.steps == 4
    assert found.to_dict()["recommendation"] is None


def test_the_frontier_falls_and_its_ends_fit(two_l4, monkeypatch):
    report = Report()
    monkeypatch.setattr(two_l4, "report", report)
    workload = Workload(images=0, new_tokens=1)
    found = frontier(two_l4, workload, [8192, 1024, 4096])
    assert list(found) == [1024, 4096, 8192]
    assert MOST_SAMPLES > found[1024] > found[4096] > found[8192] > 0
    assert report.steps == 3
    for tokens, size in found.items():
        sized = replace(workload, text_tokens=tokens, new_tokens=0)
        assert two_l4.run(replace(sized, batch_size=size)).fits
        assert not two_l4.run(replace(sized, batch_size=size + 1)).fits


def test_a_frontier_ends_at_the_models_context():
    assert frontier_tokens(Workload(new_tokens=1), RECIPE)[-1] == 8192 - 1602
    assert frontier_tokens(Workload(images=0, new_tokens=128), RECIPE)[-1] == 8192 - 127
    assert frontier_tokens(Workload(images=0, train=True), RECIPE)[-1] == 8192


def run_lines(code, card, count):
    """Execute lines to paste inside simulated cards; the model they make."""
    names = {}
    with Rig.simulated(card, count):
        exec(code, names)
    return names["model"]


def as_indices(device_map):
    return {name: getattr(place, "index", place) for name, place in device_map.items()}


def test_a_single_image_is_best_served_by_auto_alone_and_the_lines_make_that_map(two_l4):
    best = recommend(two_l4, Workload(new_tokens=1))
    assert (best.device_map, best.max_memory) == ("auto", None)
    assert (
        as_indices(run_lines(best.code, "L4", 2).hf_device_map)
        == best.placement
        == two_l4.device_map
    )
    assert (
        "dtype=torch.bfloat16" in best.code and "AutoModelForCausalLM.from_pretrained" in best.code
    )


def test_a_batch_of_images_gets_less_weights_beside_the_tower_and_the_lines_make_that_map(two_l4):
    workload = Workload(batch_size=largest_batch(two_l4, IMAGE).size, new_tokens=1)
    best = recommend(two_l4, workload)
    assert best.device_map == "auto" and list(best.max_memory) == [0, 1]
    plain = min(device.free_at_peak_bytes for device in two_l4.run(workload).devices)
    assert min(best.headroom_bytes) > plain + GIB / 4
    model = run_lines(best.code, "L4", 2)
    assert as_indices(model.hf_device_map) == best.placement != two_l4.device_map
    # What it recommends does carry further.
    on_this_map = Trials(Deployment("L4", 2, device_map=best.placement))
    assert largest_batch(on_this_map, IMAGE).size > workload.batch_size


def test_a_batch_that_auto_does_not_hold_gets_a_map_that_does(two_l4):
    workload = Workload(batch_size=largest_batch(two_l4, IMAGE).size + 1, new_tokens=1)
    assert not two_l4.run(workload).fits
    best = recommend(two_l4, workload)
    assert best is not None and min(best.headroom_bytes) >= 0
    assert fit("L4", 2, device_map=best.placement, workload=workload).fits


def test_one_large_card_needs_no_strategy():
    best = recommend(Trials(Deployment("H100")), Workload(new_tokens=1))
    assert best.device_map == {"": 0}
    assert {
        parameter.device.index for parameter in run_lines(best.code, "H100", 1).parameters()
    } == {0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"card": "L5"}, "'L5' is not in the catalogue"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"device_map": "fair"}, "device_map is 'fair'"),
    ],
)
def test_trials_refuse_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Trials(Deployment(**arguments))
