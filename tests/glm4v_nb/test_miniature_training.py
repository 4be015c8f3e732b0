"""Training from end to end, a few small steps of it."""

import itertools
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tools.miniature import train
from tools.miniature.feed import Feed
from tools.miniature.vocabulary import save_vocabulary

SMALL = (
    "--device cpu --workers 0 --batch-size 4 --pool 64 --steps 3 --log-every 1 --evaluate 3".split()
)


def trained(directory, *more) -> list[dict]:
    train.train(train.read_options(["--output", str(directory), *SMALL, *more]))
    return [json.loads(line) for line in (directory / "train.jsonl").read_text().splitlines()]


def losses(log: list[dict]) -> list[float]:
    return [record["loss"] for record in log[1:]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained")
    return directory, trained(directory)


def test_a_run_leaves_a_checkpoint_that_loads_a_log_with_its_origin_and_an_evaluation(run):
    directory, log = run
    assert (
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).config.num_layers == 4
    )
    assert {"date", "device", "torch", "transformers", "parameters", "options"} <= set(log[0])
    assert [record["step"] for record in log[1:]] == [1, 2, 3]
    assert str(directory) not in (directory / "train.jsonl").read_text()
    assert json.loads((directory / "evaluation.json").read_text())["count"] == 3


def test_the_same_seed_trains_the_same_and_another_one_does_not(run, tmp_path):
    assert losses(trained(tmp_path / "again")) == pytest.approx(losses(run[1]), rel=1e-3)
    assert losses(trained(tmp_path / "other", "--seed", "1")) != pytest.approx(
        losses(run[1]), rel=1e-3
    )


def test_gradient_checkpointing_changes_memory_and_not_the_training(run, tmp_path):
    # Autocast rounds in both passes alike, so that only the order of sums differs.
    assert losses(trained(tmp_path, "--gradient-checkpointing")) == pytest.approx(
        losses(run[1]), rel=1e-2
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_the_pictures_depend_on_the_seed_and_not_on_the_number_of_workers(workers, tmp_path):
    save_vocabulary(tmp_path, 32)

    def first_chunks(count):
        feed = Feed(tmp_path, 32, seed=5, workers=count)
        chunks = [(part.pixels.copy(), part.ids.copy()) for part in itertools.islice(feed, 4)]
        feed.close()
        return chunks

    for one, other in zip(first_chunks(0), first_chunks(workers), strict=True):
        assert all(np.array_equal(*pair) for pair in zip(one, other, strict=True))
