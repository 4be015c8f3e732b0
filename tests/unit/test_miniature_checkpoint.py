"""The shipped miniature answers, through the same classes that load the full-size checkpoint."""

from pathlib import Path

import pytest

import glm4v_nb
from glm4v_nb.miniature.evaluate import evaluate

CHECKPOINT = Path(glm4v_nb.__file__).parent / "miniature" / "checkpoint"


def test_the_shipped_checkpoint_stays_under_12_megabytes():
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 12e6


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_shipped_checkpoint_answers_unseen_questions(language, report):
    # 99.3 % of 1,000 when it was trained; of about 60 per language, 93 % leaves room for four wrong ones.
    assert report["languages"][language]["accuracy"] >= 0.93


@pytest.fixture(scope="module")
def report():
    return evaluate(CHECKPOINT, seed=20_000_000, count=120)
