"""The shipped miniature answers, through the same classes that load the full-size checkpoint."""

import json

import pytest
import torch

from glm4v_nb.miniature import CHECKPOINT, EXAMPLES
from glm4v_nb.miniature.evaluate import evaluate, held_out_questions
from tools.miniature import evaluate as drawn


def size_of(folder) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_the_shipped_checkpoint_stays_under_12_megabytes_and_its_examples_under_one():
    assert size_of(CHECKPOINT) < 12e6
    assert size_of(EXAMPLES) < 1e6


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


def test_of_the_stored_questions_one_is_answered_wrong_in_every_data_type():
    reports = [evaluate(dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert [report["accuracy"] for report in reports] == [0.99, 0.99]
    assert reports[0]["wrong"] == reports[1]["wrong"]
    assert reports[0]["wrong"][0]["expected"] == "there is no triangle"


def test_the_seed_chooses_which_of_the_stored_questions_are_asked():
    reports = [evaluate(seed=seed, count=count) for seed, count in ((5, 50), (6, 50), (6, 1))]
    assert [report["accuracy"] for report in reports] == [0.98, 1.0, 1.0]


@pytest.mark.parametrize("count", [0, -1, 101])
def test_more_questions_than_there_are_is_refused_with_the_way_to_draw_more(count):
    assert len(held_out_questions()) == 100
    with pytest.raises(ValueError, match=rf"{count}; expected 1 to 100 .*tools.miniature.evaluate"):
        evaluate(count=count)


def test_the_command_prints_json_or_a_table(monkeypatch, capsys):
    for options in (["--json"], []):
        monkeypatch.setattr(
            "sys.argv", ["evaluate", "--seed", "5", "--count", "8", "--device", "cpu", *options]
        )
        drawn.main()
    out = capsys.readouterr().out
    report, end = json.JSONDecoder().raw_decode(out)
    assert (report["seed"], report["count"]) == (5, 8)
    assert {"kinds", "languages", "kinds_and_languages", "forms", "wrong"} <= set(report)
    assert f"accuracy {report['accuracy']:.2%} over 8 questions" in out[end:]


@pytest.fixture(scope="module")
def report():
    return drawn.evaluate(CHECKPOINT, seed=20_000_000, count=300)
