"""``glm4v-nb verify``: files, names, shapes, and logits of one prompt between devices and types."""

import json
import shutil

import psutil
import pytest
import torch

from glm4v_nb import verify as verification
from glm4v_nb.cli import main
from glm4v_nb.miniature import CHECKPOINT
from glm4v_nb.model import GLM4VForConditionalGeneration
from glm4v_nb.verify import places, verify


@pytest.fixture(scope="module")
def found(checkpoint):
    return verify(checkpoint)


@pytest.fixture
def command(capfd):
    def call(*arguments):
        code = main(["verify", *map(str, arguments)])
        return code, *capfd.readouterr()

    return call


def nothing_is_loaded(*args, **kwargs):
    pytest.fail("weights were loaded")


def test_float32_and_bfloat16_on_the_cpu_agree(found):
    first, second = found.runs[:2]
    assert (first.device, first.dtype, first.difference) == ("cpu", "float32", None)
    assert (second.device, second.dtype) == ("cpu", "bfloat16")
    # Two roundings are not one: equal logits would mean that a run was compared with itself.
    assert 0 < second.difference < 0.1
    assert found.ok
    assert found.verdict.startswith("ok, ")


def test_the_first_logits_are_those_of_the_model_itself(found, checkpoint, load):
    """Not only of ``verify``'s own making: the same prompt, once more, by hand."""
    model = load()
    prompt = verification._prompt(model.config, None)
    with torch.no_grad():
        logits = model(**prompt).logits[0, -1]
    assert found.runs[0].first_tokens == tuple(logits.topk(5).indices.tolist())
    assert found.runs[0].first_logits == pytest.approx(logits.topk(5).values.tolist(), abs=2e-4)


def test_the_block_says_what_a_report_needs_and_no_path(found, checkpoint):
    text = found.text
    for part in ("config      not that of GLM-4V-9B", "tensors     75, ", "measured on"):
        assert part in text
    assert f"torch {torch.__version__}" in text
    assert found.weights_sha256[:16] in text
    assert str(checkpoint.parent) not in text


def test_a_checkpoint_with_a_tokenizer_also_answers(command):
    code, out, err = command(CHECKPOINT, "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer["ok"] and answer["verdict"] == f"ok, {len(answer['runs'])} runs agree"
    for run in answer["runs"]:
        assert {"红", "蓝"} <= set(run["answer"]), "a red circle and a blue square"


def test_a_run_that_differs_is_a_failure(checkpoint, command, monkeypatch):
    whole = GLM4VForConditionalGeneration.from_pretrained

    def other_weights(*args, dtype, **kwargs):
        model = whole(*args, dtype=dtype, **kwargs)
        if dtype == torch.bfloat16:
            torch.nn.init.zeros_(model.vision_tower.conv.weight)
        return model

    monkeypatch.setattr(GLM4VForConditionalGeneration, "from_pretrained", other_weights)
    code, out, _ = command(checkpoint)
    assert code == 1
    assert "bfloat16 on cpu: logits are " in out.splitlines()[0]


def test_logits_that_are_not_finite_are_a_failure(checkpoint, monkeypatch):
    whole = GLM4VForConditionalGeneration.from_pretrained

    def broken(*args, **kwargs):
        model = whole(*args, **kwargs)
        model.lm_head.weight.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(GLM4VForConditionalGeneration, "from_pretrained", broken)
    assert verify(checkpoint).verdict == "float32 on cpu: logits are not finite"


def truncated(folder):
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])


def without_a_shard(folder):
    (folder / "model-00001-of-00002.safetensors").unlink()


def of_another_size(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"ffn_hidden_size": 64}))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (truncated, "is damaged"),
        (without_a_shard, "shards named in"),
        (of_another_size, "other sizes than config.json describes"),
    ],
)
def test_a_damaged_checkpoint_is_one_sentence_before_anything_is_loaded(
    damaged, damage, told, command, monkeypatch
):
    damage(damaged)
    monkeypatch.setattr(GLM4VForConditionalGeneration, "from_pretrained", nothing_is_loaded)
    code, out, err = command(damaged)
    assert (code, out) == (1, "")
    assert told in err and err.count("\n") == 1


def test_no_directory_is_wrong_use(command):
    code, out, err = command("no-such-folder")
    assert (code, out) == (2, "")
    assert "Download one first: hf download" in err


def test_what_has_no_room_is_named_and_not_loaded(checkpoint, command, monkeypatch):
    monkeypatch.setattr(GLM4VForConditionalGeneration, "from_pretrained", nothing_is_loaded)
    memory = type(psutil.virtual_memory())
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(*[0] * len(memory._fields)))
    told = []
    found = verify(checkpoint, told.append)
    assert told[1] == "float32 on cpu: needs 0.0 GiB, 0.0 GiB free"
    assert all(run.skipped for run in found.runs if run.device == "cpu")
    if not torch.cuda.is_available():
        assert found.verdict == "nothing could be run"
        assert command(checkpoint)[0] == 1


def test_the_official_checkpoint_would_need_57_gib_in_float32_and_29_in_bfloat16():
    parameters = verification.meta_model().num_parameters()
    sizes = [1.1 * parameters * dtype.itemsize / 2**30 for dtype in (torch.float32, torch.bfloat16)]
    assert [round(size) for size in sizes] == [57, 28]


def test_gpus_are_tried_one_and_all_together_in_the_type_they_have(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert places()[2:] == [("cuda:0", torch.bfloat16), ("2 GPUs", torch.bfloat16)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert places()[2] == ("cuda:0", torch.float16)


def test_the_commit_is_read_from_where_the_hub_has_left_it(checkpoint, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert verification._commit(tmp_path) is None
    notes = tmp_path / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / "config.json.metadata").write_text(f"{commit}\nabc\n1.0\n")
    assert verification._commit(tmp_path) == commit
    snapshot = tmp_path / "snapshots" / commit
    shutil.copytree(checkpoint, snapshot)
    assert verification._commit(snapshot) == commit
