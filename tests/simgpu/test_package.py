"""simgpu by itself: what importing it costs and brings, and what its README promises."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import simgpu

README = Path(simgpu.__file__).with_name("README.md")


LIGHT = """
import json, sys
import simgpu, simgpu.catalog, simgpu.checkpoints, simgpu.oom, simgpu.units
from simgpu import CARDS, MAX_CARDS, find_card
heavy = {"torch", "transformers", "accelerate", "glm4v_nb", "nbsweep"}
before = sorted(heavy & set(sys.modules))
from simgpu import Card, CardMemory, HostMemory, Rig, Stage
rig = Rig.simulated("L4")
with rig:  # nothing of transformers has been asked for before
    from transformers import AutoModelForCausalLM, Qwen3Config
own = AutoModelForCausalLM.from_pretrained.__func__.__module__
print(json.dumps([before, sorted(heavy & set(sys.modules)), isinstance(rig, Rig), own]))
"""


def test_cards_units_and_messages_come_without_torch_and_a_rig_without_any_model(tmp_path):
    path = f"import sys\nsys.path.insert(0, {str(Path(simgpu.__file__).parents[1])!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", path + LIGHT],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, after, is_rig, owner = json.loads(done.stdout)
    assert before == []
    assert after == ["accelerate", "torch", "transformers"]
    assert is_rig
    assert owner == "transformers.models.auto.auto_factory"


def test_every_public_name_is_there_and_no_other():
    assert set(simgpu.__all__) <= set(dir(simgpu))
    assert all(getattr(simgpu, name) is not None for name in simgpu.__all__)
    with pytest.raises(AttributeError, match="module 'simgpu' has no attribute 'Rigg'"):
        simgpu.Rigg  # noqa: B018


def test_the_code_of_the_readme_prints_what_stands_beside_it(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, README, "exec"), {})
    assert capsys.readouterr().out == re.search(r"# (NVIDIA.*)\n", code)[1] + "\n"


def test_the_readme_is_one_screen_and_its_links_lead_somewhere():
    text = README.read_text(encoding="utf-8")
    by_hand = re.sub("<!-- .*?<!-- end -->\n\n", "", text, flags=re.DOTALL)  # and not generated
    assert len(by_hand.splitlines()) <= 60
    for link in re.findall(r"\]\(((?!http)[^)#]+)", text):
        assert (README.parent / link).exists(), link
