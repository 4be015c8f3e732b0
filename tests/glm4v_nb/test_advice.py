"""What is advised has been tried: it fits."""

import re
from pathlib import Path

import pytest

import glm4v_nb.cli
from glm4v_nb.fit import fit
from glm4v_nb.workload import Workload
from simgpu import find_card, fitting
from simgpu.advice import candidates, changed, what_fits

TEXT = Workload(images=0, new_tokens=1)
ON_CARD_0 = {"vision_tower": 0, "language_model": 0, "lm_head": 1}


def silent(words):
    pass


@pytest.mark.parametrize(
    ("arguments", "workload", "expected"),
    [
        # The weights of T4 in bfloat16 fit, its attention does not.
        (("T4", 2), Workload(new_tokens=1), {"dtype": "float16"}),
        (("T4", 1), TEXT, {"dtype": "float16", "count": 2}),
        (("L4", 2, "bfloat16", ON_CARD_0), TEXT, {"device_map": "auto"}),
        (("L4", 1, "bfloat16", {"": 0}), TEXT, {"device_map": "auto", "count": 2}),
        # No number of these cards holds one block of the tower for so many pictures.
        (("L4", 2), Workload(batch_size=300, new_tokens=0), None),
    ],
)
def test_what_is_advised_fits(arguments, workload, expected):
    result = fit(*arguments, workload=workload)
    changes = what_fits(result, silent)
    if expected is not None:
        assert changes == expected
    deployment, workload = changed(*result.asked, changes)
    assert deployment.fit(workload).fits


def test_a_run_that_fits_in_the_right_type_needs_no_advice_and_the_wrong_type_is_told():
    assert what_fits(fit("H100", workload=TEXT), silent) is None
    old = fit("V100-32", workload=TEXT)
    assert old.fits and not find_card("V100-32").bf16_supported
    assert what_fits(old, silent) == {"dtype": "float16"}


def test_nothing_is_advised_that_was_not_seen_to_fit(monkeypatch):
    result, tried = fit("L4", 2, workload=Workload(batch_size=300, new_tokens=0)), []
    expected = list(candidates(result))
    assert not any("count" in changes for changes in expected), "more cards do not help"

    def never(deployment, workload):
        tried.append(workload)
        return result

    monkeypatch.setattr(fitting.Deployment, "fit", never)
    assert what_fits(result, silent) is None
    assert len(tried) == len(expected) > 2
    assert min(each.batch_size for each in tried) == 1


def test_every_command_that_stands_in_the_package_as_advice_fits(capsys):
    files = Path(glm4v_nb.__file__).parent.rglob("*.py")
    found = set()
    for file in files:
        words = " ".join(file.read_text(encoding="utf-8").split())
        found |= set(re.findall(r"Next: glm4v-nb (fit(?: --[a-z-]+ [A-Za-z0-9]+)+)", words))
    assert found == {"fit --card L4 --count 2"}
    for command in found:
        assert glm4v_nb.cli.main(command.split()) == 0
        assert "It fits" in capsys.readouterr().out
