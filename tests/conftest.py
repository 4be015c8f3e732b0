"""What tests of the model and of simulated cards share: the recorded original.

The process that hands out tests loads this file, too, and they wait for it: so torch is imported
by the first test that needs it.
"""

from pathlib import Path

import pytest

import glm4v_nb  # noqa: F401

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Matrices this small gain nothing from threads, and on a busy machine threads that wait cost
    minutes."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """A tiny random checkpoint in the official layout. Read only: copy it to change it."""
    return GOLDEN / "checkpoint"


@pytest.fixture(scope="session")
def golden(checkpoint) -> dict:
    """What the original implementation computed with that checkpoint, in fp32 on a CPU: tensors by
    name."""
    from safetensors.torch import load_file

    return load_file(checkpoint / "expected.safetensors")


@pytest.fixture(scope="session")
def load(checkpoint):
    """Load the checkpoint through the Auto class, ready for inference."""
    from transformers import AutoModelForCausalLM

    return lambda **options: AutoModelForCausalLM.from_pretrained(checkpoint, **options).eval()


@pytest.fixture(scope="session")
def model(load):
    """The loaded checkpoint, shared by all tests: none may change it."""
    return load().requires_grad_(False)
