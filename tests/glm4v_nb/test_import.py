"""Importing the package: it registers the model with transformers, and waits for nobody's torch."""

import subprocess
import sys

import pytest
import transformers

from glm4v_nb.model import GLM4VConfig


def said_by(*lines: str) -> str:
    """What a new interpreter prints that runs these lines."""
    command = [sys.executable, "-c", "\n".join(lines)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


@pytest.mark.parametrize(
    "first", ["import glm4v_nb", "from glm4v_nb.model.configuration import official_config"]
)
def test_transformers_knows_the_model_whatever_is_imported_first(first):
    known = "print(type(transformers.AutoConfig.for_model('chatglm')).__name__)"
    assert said_by(first, "import transformers", known) == "GLM4VConfig"


def test_transformers_knows_the_model_where_it_was_imported_before():
    """In this process, whose conftest.py begins with transformers."""
    assert type(transformers.AutoConfig.for_model("chatglm")) is GLM4VConfig


def test_the_package_alone_loads_neither_torch_nor_transformers():
    heavy = "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert said_by("import sys, glm4v_nb, glm4v_nb.cli", heavy) == "[]"


@pytest.mark.parametrize("package", ["glm4v_nb", "simgpu"])
@pytest.mark.parametrize("platform", ["win32", "linux"])
def test_on_windows_one_sentence_says_that_it_was_not_tried_there(platform, package):
    # wrapt, which imports asyncio, really asks for Windows then.
    code = f"import sys, wrapt; sys.platform = {platform!r}; import {package}"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (0, "")
    assert ("not tried on Windows: use WSL 2" in process.stderr) == (platform == "win32")
