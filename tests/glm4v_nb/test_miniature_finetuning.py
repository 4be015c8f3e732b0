"""QLoRA of the miniature on a new colour: its questions, its rows, a few small steps of it."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from glm4v_nb.inference import load
from glm4v_nb.miniature import CHECKPOINT
from glm4v_nb.training import ExpandingCollator, answer_row
from tools.miniature import finetune, scenes
from tools.miniature.new_colour import NEW, examples

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="module")
def loaded():
    return load(CHECKPOINT)


def test_questions_are_about_the_new_colour_or_as_they_were():
    asked = examples(np.random.default_rng(0), 60)
    assert all(NEW in question + answer for _, question, answer, _ in asked)
    assert {"no", "yes"} & {answer for _, _, answer, kind in asked if kind == "exists"}
    others = examples(np.random.default_rng(0), 60, new=0.0)
    assert not any(NEW in question + answer for _, question, answer, _ in others)
    assert NEW not in scenes.COLOURS, "other tools draw from the same table"


def test_held_out_questions_are_none_of_those_that_are_trained():
    trained = examples(np.random.default_rng(finetune.TRAINING_SEED), 200, finetune.NEW_SHARE)
    asked = examples(np.random.default_rng(finetune.HELD_OUT_SEED), 50)
    seen = {picture.tobytes() for picture, *_ in trained}
    assert not seen & {picture.tobytes() for picture, *_ in asked}


def test_of_a_row_the_answer_alone_counts_and_it_ends_with_the_next_turn(loaded):
    model, processor = loaded
    (example,) = examples(np.random.default_rng(3), 1)
    row = answer_row(processor, *example[:3])
    answer = row["labels"][row["labels"] != -100]
    assert processor.tokenizer.decode(answer) == f"\n{example[2]}<|user|>"
    assert torch.equal(row["input_ids"][-len(answer) :], answer)
    asked = processor([example[0]], [example[1]])["input_ids"][0]
    assert torch.equal(row["input_ids"][: -len(answer)], asked)
    # The loss is the answer's: what the model says of its tokens, one by one.
    batch = ExpandingCollator(model.config)([row])
    with torch.no_grad():
        output = model(**batch, use_cache=False)
    expected = torch.nn.functional.cross_entropy(
        output.logits[0, -len(answer) - 1 : -1].float(), answer
    )
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-2)


@needs_bitsandbytes
def test_an_adapter_on_a_quantised_base_learns_is_saved_and_answers_the_same(tmp_path):
    base, processor = load(CHECKPOINT, weights="nf4")
    model = finetune.adapted(base)
    packed = base.language_model.layers[0].mlp.down_proj.weight
    before = packed.detach().clone()
    losses = [loss for _, loss in finetune.train(model, processor, 12, 4, 4e-3)]
    assert losses[-1] < losses[0]
    assert torch.equal(packed, before), "the base stays as it is"
    finetune.save(model, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 2e6
    asked = examples(np.random.default_rng(5), 8)
    again = finetune.with_adapter(tmp_path, "nf4")
    given = finetune.answers(again, processor, asked)
    assert given == finetune.answers(model.eval(), processor, asked)
    assert given != finetune.answers(load(CHECKPOINT, weights="nf4")[0], processor, asked)
    # An adapter of 12 steps moves the weights that it is merged into.
    merged = finetune.merged(tmp_path, None)
    plain = load(CHECKPOINT)[0]
    moved = merged.lm_head.weight - plain.lm_head.weight
    assert moved.abs().max() > 0


def test_the_stored_run_learned_the_colour_and_says_what_it_was():
    run = json.loads((RESULTS / "miniature_finetuned.json").read_text(encoding="utf-8"))
    first, *_, last = run["curve"]
    assert (first["step"], last["step"]) == (0, run["options"]["steps"])
    assert first["new"] == run["before"]["new"] < 0.6
    after = run["after"]
    assert after["adapter on nf4"]["new"] >= 0.95 and after["adapter on nf4"]["as_adapter"] == 1
    assert set(after) == {
        "adapter on nf4",
        "adapter on bfloat16",
        "merged into bfloat16",
        "merged into bfloat16, saved, loaded as nf4",
        "merged into nf4",
    }
    assert run["targets"] == finetune.TARGETS and run["colour"] == NEW
