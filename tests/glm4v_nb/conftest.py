"""What the model's tests share: prompts, a checkpoint that fits the tiny tokenizer, and a service
that is asked, which a module's own fixture ``served`` starts."""

import importlib
import resource
import shutil
from pathlib import Path

import psutil
import pytest
import torch
from damage import forbidden
from transformers import AutoModelForCausalLM, AutoProcessor
from transformers.integrations import hub_kernels

from glm4v_nb.model import GLM4VConfig, GLM4VForConditionalGeneration

TOKENIZER = Path(__file__).parents[1] / "golden" / "tokenizer"


@pytest.fixture
def damaged(checkpoint, tmp_path) -> Path:
    """A copy of the checkpoint for a test to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def interpreter():
    """Triton's interpreter for the kernels of fast decoding, which it takes a second a step."""
    pytest.importorskip("triton", reason="Triton is not installed: no kernels to test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        from glm4v_nb.inference import kernels, prefill_kernels, products
        from glm4v_nb.parallel import kernels as shared_kernels

        for each in (products, kernels, prefill_kernels, shared_kernels):
            importlib.reload(each)  # another test may have had them to be compiled
        yield


@pytest.fixture(scope="session")
def questions(golden) -> list[dict]:
    """Prompts of unequal length: a short one with an image, a longer one without, one with another
    image."""
    first, second = golden["image.input_ids"]
    images = golden["vision.pixel_values"]
    return [
        {"input_ids": first[None, :9], "pixel_values": images[:1]},
        {"input_ids": golden["text.input_ids"]},
        {"input_ids": second[None], "pixel_values": images[1:]},
    ]


@pytest.fixture(scope="session")
def left_padded(model):
    """Put prompts into one batch as the tokenizer does: padding on the left, masked."""

    def batch(prompts):
        length = max(prompt["input_ids"].shape[1] for prompt in prompts)
        padding = [length - prompt["input_ids"].shape[1] for prompt in prompts]
        inputs = {
            name: torch.cat(
                [
                    torch.nn.functional.pad(values, (missing, 0), value=fill)
                    for values, missing in zip(rows, padding, strict=True)
                ]
            )
            for name, rows, fill in (
                (
                    "input_ids",
                    [prompt["input_ids"] for prompt in prompts],
                    model.config.pad_token_id,
                ),
                ("attention_mask", [torch.ones_like(prompt["input_ids"]) for prompt in prompts], 0),
            )
        }
        images = [prompt["pixel_values"] for prompt in prompts if "pixel_values" in prompt]
        return inputs | ({"pixel_values": torch.cat(images)} if images else {})

    return batch


@pytest.fixture(scope="session")
def chat_checkpoint(model, tmp_path_factory) -> Path:
    """A tiny checkpoint whose vocabulary fits the golden tokenizer, with all the files of an
    official one."""
    directory = tmp_path_factory.mktemp("chat") / "checkpoint"
    config = GLM4VConfig.from_dict(
        model.config.to_dict(),
        padded_vocab_size=528,
        boi_token_id=522,
        eoi_token_id=523,
        pad_token_id=512,
        eos_token_id=[512, 519, 521],
    )
    torch.manual_seed(0)
    larger = GLM4VForConditionalGeneration(config)
    # The recorded model's layers, so that an image matters as much as there; a wider vocabulary
    # around them.
    vocabulary = ("language_model.embed_tokens.weight", "lm_head.weight")
    weights = {
        name: tensor for name, tensor in model.state_dict().items() if name not in vocabulary
    }
    larger.load_state_dict(weights, strict=False)
    with torch.no_grad():
        larger.language_model.embed_tokens.weight.normal_(
            std=model.language_model.embed_tokens.weight.std()
        )
        larger.lm_head.weight.normal_(std=model.lm_head.weight.std())
    larger.save_pretrained(directory)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, directory / name)
    return directory


@pytest.fixture(scope="session")
def chat(chat_checkpoint):
    """The model and the processor of ``chat_checkpoint``."""
    chat_model = AutoModelForCausalLM.from_pretrained(chat_checkpoint).eval().requires_grad_(False)
    return chat_model, AutoProcessor.from_pretrained(chat_checkpoint)


@pytest.fixture
def folder(chat_checkpoint, tmp_path, monkeypatch):
    """A copy of a good checkpoint to damage, where nobody may be asked, no pickle read, and no
    gigabyte taken."""
    monkeypatch.setattr("builtins.input", forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    monkeypatch.setattr(hub_kernels, "get_kernel", forbidden)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = psutil.Process().memory_info().vms + 512 * 2**20  # of the machine, whatever a file says
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    yield shutil.copytree(chat_checkpoint, tmp_path / "checkpoint")
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="module")
def service(served):
    return served[0]


@pytest.fixture(scope="module")
def client(served):
    """OpenAI's, which does not try again."""
    import openai

    with openai.OpenAI(base_url=served[1] + "/v1", api_key="none", max_retries=0) as one:
        yield one


@pytest.fixture(scope="module")
def http(client):
    """The client's own HTTP client, for what the openai client would not send."""
    return client._client
