"""The shipped miniature answers, through the same classes that load the full-size checkpoint."""

import json
from pathlib import Path

import pytest

import glm4v_nb
from glm4v_nb.miniature.evaluate import evaluate, main

CHECKPOINT = Path(glm4v_nb.__file__).parent / "miniature" / "checkpoint"


def test_the_shipped_checkpoint_stays_under_12_megabytes():
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 12e6


def test_the_shipped_checkpoint_answers_unseen_questions(report):
    # 98.95 % of 2,000 is what it was released with; of 300 that leaves room for three standard
    # errors.
    assert report["accuracy"] >= 0.97, report["wrong"]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_it_answers_in_both_languages(language, report):
    # About 150 of each: three standard errors again.
    assert report["languages"][language]["accuracy"] >= 0.96


@pytest.mark.parametrize("form", ["drawn", "jpeg", "alpha", "grey", "wide", "large"])
def test_it_answers_about_pictures_as_people_have_them(form, report):
    # About 30 of each but "drawn": 80 % leaves room for six wrong ones.
    assert report["forms"][form]["accuracy"] >= 0.8


def test_the_command_prints_json_or_a_table(monkeypatch, capsys):
    for options in (["--json"], []):
        monkeypatch.setattr(
            "sys.argv", ["evaluate", "--seed", "5", "--count", "8", "--device", "cpu", *options]
        )
        main()
    out = capsys.readouterr().out
    report, end = json.JSONDecoder().raw_decode(out)
    assert (report["seed"], report["count"]) == (5, 8)
    assert {"kinds", "languages", "kinds_and_languages", "forms", "wrong"} <= set(report)
    assert f"accuracy {report['accuracy']:.2%} over 8 questions" in out[end:]


@pytest.fixture(scope="module")
def report():
    return evaluate(CHECKPOINT, seed=20_000_000, count=300)
