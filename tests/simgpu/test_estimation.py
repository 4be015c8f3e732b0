"""``simgpu.estimate``: what a function takes, of what, by which line, and what it would need."""

import inspect
from pathlib import Path

import pytest
import torch

import simgpu
from simgpu import Rig
from simgpu.oom import parse_out_of_memory

WIDTH, LAYERS, BATCH = 4096, 4, 8
WEIGHTS = LAYERS * 4 * WIDTH * WIDTH
MIB, GIB = 2**20, 2**30


def train(steps=2):
    model = torch.nn.Sequential(
        *[torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
    ).to("cuda")
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        loss = model(torch.zeros(BATCH, WIDTH, device="cuda")).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert loss.item() == 0.0  # which is assumed


def line_of(text: str) -> int:
    lines, start = inspect.getsourcelines(train)
    return start + next(number for number, line in enumerate(lines) if text in line)


@pytest.fixture(scope="module")
def found():
    return simgpu.estimate(train, card="L4")


def test_the_parts_of_a_peak_are_what_training_keeps_and_add_up_to_it(found):
    (card,) = found.cards
    assert found.fits and found.verdict == "fits" and found.oom is None
    assert found.headroom_bytes == card.free_at_peak_bytes > 0
    assert card.by_purpose["parameters"] == card.by_purpose["gradients"] == WEIGHTS
    # AdamW keeps two numbers a weight, and a counter of its steps on the CPU.
    assert card.by_purpose["optimizer"] == 2 * WEIGHTS
    assert card.by_purpose["workspace"] >= 8 * MIB
    assert sum(card.by_purpose.values()) == card.peak_allocated_bytes <= card.peak_reserved_bytes


def test_every_byte_has_the_line_of_the_callers_code_that_made_it(found):
    (card,) = found.cards
    assert sum(line.bytes for line in card.by_line) == card.peak_allocated_bytes
    by_line = {line.line: line for line in card.by_line}
    assert {Path(line.file).name for line in card.by_line} == {Path(__file__).name}
    assert by_line[line_of("optimizer.step()")].bytes >= 2 * WEIGHTS
    assert by_line[line_of("loss.backward()")].bytes >= WEIGHTS
    assert by_line[line_of('.to("cuda")')].bytes == WEIGHTS
    assert by_line[line_of("loss.backward()")].text == "loss.backward()"


def test_what_was_assumed_is_counted_and_versions_are_told(found):
    assert found.exact and found.assumed == {"item": 2} and found.unmodelled == {}
    assert found.versions["torch"] == torch.__version__
    assert list(found.versions) == ["torch", "transformers", "accelerate"]
    answer = found.to_dict()
    assert answer["verdict"] == "fits" and "needs_bytes" not in answer
    assert answer["devices"][0]["by_purpose"]["gradients"] == WEIGHTS


def test_a_number_may_be_refused_instead():
    with pytest.raises(RuntimeError, match="needs the numbers in a tensor"):
        simgpu.estimate(train, card="L4", assume="refuse")


def test_what_does_not_fit_has_pytorchs_error_and_what_it_would_need():
    found = simgpu.estimate(train, card="T4 1GiB")
    message = parse_out_of_memory(found.oom)
    (card,) = found.cards
    assert not found.fits and message.device == 0 and found.headroom_bytes == 0
    assert card.by_purpose["parameters"] == WEIGHTS, "told at the failure, too"
    assert card.short_bytes == card.needs_bytes - card.capacity_bytes > 0
    assert "short on card 0" in found.summary
    assert found.to_dict()["needs_bytes"] == card.needs_bytes
    enough = f"T4 {card.needs_bytes / MIB + 1:.0f}MiB"
    assert simgpu.estimate(train, card=enough).fits
    less = f"T4 {card.needs_bytes / MIB - 100:.0f}MiB"
    assert not simgpu.estimate(train, card=less, needs=False).fits


def test_a_function_that_must_not_be_called_twice_is_not():
    calls = []

    def fill():
        calls.append(torch.empty(30 * GIB, dtype=torch.uint8, device="cuda"))

    found = simgpu.estimate(lambda: (calls.append(None), fill()), card="L4", needs=False)
    assert not found.fits and len(calls) == 1
    assert found.cards[0].needs_bytes is None and found.summary.endswith("card 0 is full.")


def test_an_error_that_the_program_caught_is_told_and_does_not_end_it():
    def try_smaller():
        for gibibytes in (40, 10):
            try:
                return torch.empty(gibibytes * GIB, dtype=torch.uint8, device="cuda")
            except torch.OutOfMemoryError:
                pass

    found = simgpu.estimate(try_smaller, card="L4")
    assert found.fits and len(found.caught) == 1
    assert "Tried to allocate 40.00 GiB" in found.caught[0]
    assert found.peak_allocated_bytes == 10 * GIB


def test_a_failure_of_the_functions_own_is_its_own():
    with pytest.raises(KeyError, match="mine"):
        simgpu.estimate(lambda: {}["mine"], card="L4")
    assert Rig.active is None


def test_an_assumed_length_is_as_long_as_it_can_be_and_not_exact():
    def select():
        scores = torch.randn(100, 4, device="cuda")
        assert scores[scores > 0].shape == (400,)
        assert scores.nonzero().shape == (400, 2)
        assert scores.masked_select(scores > 0).shape == (400,)
        assert not torch.equal(scores, scores)
        assert torch.isfinite(scores).all() and not torch.isnan(scores).any()
        assert not (scores > 0).all()

    found = simgpu.estimate(select, card="L4")
    assert not found.exact
    counts = {"index": 1, "nonzero": 1, "masked_select": 1, "equal": 1, "isfinite": 2, "item": 2}
    assert found.assumed == counts


def test_cards_of_several_kinds_and_with_others_on_them_are_what_they_are():
    def spread():
        for index in (0, 1):
            torch.empty(8 * GIB, dtype=torch.uint8, device=f"cuda:{index}")

    cards = ["RTX 4090", "RTX 3090"]
    assert simgpu.estimate(spread, cards).fits
    found = simgpu.estimate(spread, cards, free_gib=[20, 5])
    assert not found.fits and parse_out_of_memory(found.oom).device == 1
    assert [card.card for card in found.cards] == cards
    assert [card.short_bytes > 0 for card in found.cards] == [False, True]
