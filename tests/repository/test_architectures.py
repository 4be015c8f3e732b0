"""What is said of transformers' architectures is what was found, by the program that found it."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
SPECIFICATION = importlib.util.spec_from_file_location(
    "architectures", ROOT / "tools" / "architectures.py"
)
architectures = importlib.util.module_from_spec(SPECIFICATION)
SPECIFICATION.loader.exec_module(architectures)


def test_at_least_95_percent_run_or_are_refused_and_the_readme_names_the_others():
    results = json.loads(architectures.RESULT.read_text(encoding="utf-8"))["results"]
    assert architectures.share(results) >= 0.95
    text = architectures.README.read_text(encoding="utf-8")
    start, end = architectures.place_in(text)
    assert text[start:end] == architectures.in_readme(results)


def test_an_architecture_that_fails_lowers_the_share_and_one_that_changes_is_named():
    done, failed = ("done", ""), ("forward", "RuntimeError: shapes")
    refused = (
        "forward",
        "RuntimeError: it needs numbers, and tensors on simulated cards have none",
    )
    before = {
        "A": architectures.judge(done, done),
        "B": architectures.judge(done, refused),
        "C": architectures.judge(failed, None),
    }
    assert [kind for kind, _ in before.values()] == ["runs", "refused", "no control"]
    assert architectures.share(before) == 1
    after = before | {"A": architectures.judge(done, failed), "C": architectures.judge(done, done)}
    assert architectures.share(after) == 2 / 3
    assert architectures.differences(before, after) == ["A"]
