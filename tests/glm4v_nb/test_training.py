"""A training step by what it trains and with which optimiser: gradients, adapters, states, and what
they take."""

import gc
import sys

import pytest
import torch
from rig_fixtures import OFFICIAL, load

from glm4v_nb.fit import fit
from glm4v_nb.training import first_update, train_step, trained_parameters
from glm4v_nb.workload import Workload, make_prompt
from simgpu import Rig

DECODER_WEIGHTS = 9_399_951_360
# Rank 16: (4096 + 4096) x 16 for the queries and (4096 + 256) x 16 for the values of each of 40
# layers.
LORA_WEIGHTS = 40 * 16 * (4096 + 4096 + 4096 + 256)


@pytest.fixture
def tiny():
    with Rig("H100") as rig:
        yield rig, load()


def test_everything_but_the_tower_is_trained_where_only_the_decoder_is(tiny):
    _, model = tiny
    parameters = trained_parameters(model, "decoder")
    frozen = list(model.vision_tower.parameters())
    assert len(parameters) + len(frozen) == len(list(model.parameters()))
    assert not any(parameter.requires_grad for parameter in frozen)
    assert len(trained_parameters(model, "everything")) == len(list(model.parameters()))


def test_lora_trains_its_adapters_alone_and_they_get_gradients_through_checkpoints(tiny):
    _, model = tiny
    parameters = trained_parameters(model, "lora")
    assert {
        name.split(".")[-3] for name, each in model.named_parameters() if each.requires_grad
    } == {"lora_A", "lora_B"}
    train_step(
        model, make_prompt(model, Workload(images=1, text_tokens=4)), gradient_checkpointing=True
    )
    assert all(parameter.grad is not None for parameter in parameters)
    assert [
        each for each in model.parameters() if each.grad is not None and not each.requires_grad
    ] == []
    # A second step on the same model adds no second set.
    assert len(trained_parameters(model, "lora")) == len(parameters)


def test_the_adapters_of_the_full_size_model_have_the_size_of_the_arithmetic():
    with Rig("H100"):
        model = load(OFFICIAL, device_map={"": 0})
        parameters = trained_parameters(model, "lora")
    assert sum(parameter.numel() for parameter in parameters) == LORA_WEIGHTS


@pytest.mark.parametrize(("foreach", "for_a_moment"), [(None, 1), (False, 2)])
def test_adamw_keeps_two_numbers_for_every_weight_and_needs_more_for_a_moment(
    tiny, foreach, for_a_moment
):
    rig, _ = tiny
    weight = torch.nn.Parameter(torch.zeros(8 * 2**20, device="cuda"))
    weight.grad = torch.zeros_like(weight)
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer = first_update([weight], foreach=foreach)
    assert torch.cuda.memory_allocated() - before == 2 * weight.nbytes
    # The square root of the second number, which is divided in place or, one weight after the
    # other, into a copy.
    assert torch.cuda.max_memory_allocated() - before == (2 + for_a_moment) * weight.nbytes
    del optimizer
    assert torch.cuda.memory_allocated() == before


def test_many_weights_at_a_time_is_the_default_on_cards_and_takes_a_copy_of_them_all(tiny):
    weights = [torch.nn.Parameter(torch.zeros(4 * 2**20, device="cuda")) for _ in range(8)]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    peaks = {}
    for foreach in (None, False):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        first_update(weights, foreach=foreach)
        peaks[foreach] = (torch.cuda.max_memory_allocated() - before) // weights[0].nbytes
    # One after the other: the two of this weight, and the one that the loop still holds of the
    # weight before.
    assert peaks == {None: 8 * 3, False: 8 * 2 + 3}


def test_full_size_training_adds_up_gradients_and_states():
    common = {"train": True, "images": 0, "text_tokens": 8, "gradient_checkpointing": True}
    peaks = {
        name: fit("H200", workload=Workload(**common, **options)).devices[0].peak_allocated_bytes
        for name, options in {
            "everything": {},
            "decoder": {"trained": "decoder"},
            "decoder, AdamW": {"trained": "decoder", "optimizer": "adamw"},
            "lora": {"trained": "lora"},
            "lora, AdamW": {"trained": "lora", "optimizer": "adamw"},
        }.items()
    }
    weights = 27_812_641_792
    # Without an image the tower gets no gradients; a step over 8 tokens needs little besides.
    assert peaks["everything"] == pytest.approx(weights + 2 * DECODER_WEIGHTS, rel=0.02)
    assert peaks["decoder"] == pytest.approx(peaks["everything"], rel=0.001)
    # Two states of two bytes, and the square roots.
    assert peaks["decoder, AdamW"] == pytest.approx(weights + 2 * DECODER_WEIGHTS * 4, rel=0.02)
    assert weights + 4 * LORA_WEIGHTS < peaks["lora"] < weights + 1.5e9
    assert peaks["lora, AdamW"] < weights + 1.5e9


def test_running_out_in_the_update_is_a_phase_of_its_own():
    result = fit(
        "A100-80", workload=Workload(train=True, images=0, trained="decoder", optimizer="adamw")
    )
    assert result.oom.phase == "optimizer"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"train": True, "trained": "tower"},
            "trained is 'tower'; expected one of 'everything', 'decoder', 'lora'.",
        ),
        ({"train": True, "optimizer": "sgd"}, "optimizer is 'sgd'; expected one of '', 'adamw'."),
        ({"trained": "lora"}, "which is for training. Set train as well"),
        ({"optimizer": "adamw"}, "which is for training. Set train as well"),
    ],
)
def test_an_impossible_training_is_refused(options, text):
    with pytest.raises(ValueError, match=text.replace(".", r"\.")):
        Workload(**options)


def test_lora_without_its_library_says_what_to_install(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="Run: pip install peft"):
        trained_parameters(tiny[1], "lora")
