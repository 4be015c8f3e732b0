"""Several processes that share every layer, on the CPU: the same answers as from one."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from glm4v_nb.cli import main
from glm4v_nb.fit import fit
from glm4v_nb.inference import generate
from glm4v_nb.inference import load as load_checkpoint
from glm4v_nb.miniature import CHECKPOINT, EXAMPLES
from glm4v_nb.model import official_config
from glm4v_nb.model.configuration import read_config
from glm4v_nb.parallel import Ranks, check_count, load_rank, loading
from glm4v_nb.parallel.plan import style_of
from glm4v_nb.workload import Workload
from simgpu import advice
from simgpu.ranks import TensorParallel

PROGRAM = Path(__file__).parents[1] / "support" / "ranks_program.py"
QUESTION = "How many crosses are there?"


@pytest.fixture(scope="module")
def batch(questions, left_padded):
    return left_padded(questions)


@pytest.fixture(scope="module")
def started(tmp_path_factory, checkpoint, batch):
    """What four ranks, and then two of them, have left in a folder; and torchrun's end."""
    folder = tmp_path_factory.mktemp("ranks")
    shutil.copytree(checkpoint, folder / "checkpoint")
    save_file(batch, folder / "batch.safetensors")
    # So slow that a rank which is left can say that another is gone, before torchrun ends it.
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"]
    command += ["--monitor-interval", "3", "--master-port", "0", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", PROGRAM, folder]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment["TRITON_INTERPRET"] = "1"
    ended = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    ended.at = time.time()
    return folder, ended


@pytest.fixture(scope="module")
def answers(started):
    """What the two ranks found with the miniature."""
    return [json.loads((started[0] / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("count", [2, 4])
def test_logits_and_new_tokens_of_a_padded_batch_are_those_of_one_process(
    started, model, batch, count
):
    with torch.no_grad():
        expected = model(**batch).logits
    new = model.generate(**batch, max_new_tokens=6, do_sample=False)
    for rank in range(count):
        found = load_file(started[0] / f"{count}-{rank}.safetensors")
        # Sums of float32 in another order; logits are up to 5, a bias too much moves them by 0.01.
        torch.testing.assert_close(found["logits"], expected, rtol=0, atol=1e-4)
        assert torch.equal(found["new"], new)


@pytest.mark.parametrize("count", [2, 4])
def test_fused_kernels_of_all_ranks_give_the_tokens_of_one_process(started, model, batch, count):
    pytest.importorskip("triton", reason="Triton is not installed: no kernels to test")
    new = model.generate(**batch, max_new_tokens=6, do_sample=False)
    for rank in range(count):
        found = load_file(started[0] / f"{count}-{rank}.safetensors")
        assert found["steps"].item() == 3
        assert torch.equal(found["fast"], new[:, : found["fast"].shape[1]])
        assert torch.equal(found["exchanged"], found["fast"])


def test_answers_whole_and_streamed_are_those_of_one_process(answers):
    model, processor = load_checkpoint(CHECKPOINT, dtype=torch.float32)
    message = {"role": "user", "image": str(EXAMPLES / "five_shapes.png"), "content": QUESTION}
    answer = generate(model, processor, [message]).text
    for found in answers:
        assert found["answer"] == found["streamed"] == answer
    assert [found["printed"] for found in answers] == [f"{answer}\n", ""]


def test_what_is_drawn_is_the_same_on_every_rank(answers):
    assert answers[0]["drawn"] == answers[1]["drawn"]


def test_one_rank_that_cancels_stops_all_at_the_same_token(answers):
    assert answers[0]["cancelled"] == answers[1]["cancelled"]
    assert answers[0]["cancelled"][0] == "cancelled"


def test_ranks_draw_the_same_with_generators_in_other_states_and_ones_own_with_equal(answers):
    assert answers[0]["unseeded"] == answers[1]["unseeded"]
    model, processor = load_checkpoint(CHECKPOINT, dtype=torch.float32)
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True
    )
    torch.manual_seed(7)
    drawn = model.generate(**prompt, max_new_tokens=6, do_sample=True, temperature=2.0, top_k=0)
    assert answers[0]["seeded"] == answers[1]["seeded"] == drawn[0].tolist()


def test_ranks_that_are_asked_different_things_say_so(answers):
    for found in answers:
        assert "asked different things. Expected the same conversation" in found["differ"]
        assert "asked different things" in found["other lengths"]


def test_a_rank_that_is_killed_ends_all_with_one_line(started):
    folder, ended = started
    assert ended.returncode
    assert ended.at - float((folder / "killed").read_text()) < 30
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, ended.stderr
    assert "Rank 0 of 2 does not reach the others" in lines[0]
    assert "One has ended" in lines[0]


@pytest.fixture
def torchrun(monkeypatch):
    """As torchrun starts rank 0 of so many, who must not be waited for."""

    def environment(count):
        for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": count}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", "1")

    def reached(*_):
        raise AssertionError("it met the others, or loaded")

    monkeypatch.setattr(Ranks, "join", reached)
    monkeypatch.setattr("glm4v_nb.inference.loading.load_rank", reached)
    return environment


def test_three_ranks_are_refused_before_anything_is_loaded(torchrun):
    torchrun(3)
    with pytest.raises(
        ValueError, match=r"^3 ranks cannot share this model: its 4 heads .* Take one of 1, 2\.$"
    ):
        load_checkpoint(CHECKPOINT, parallel="tensor")


def test_the_official_model_goes_into_1_2_4_8_or_16_ranks():
    config = official_config()
    for count in (1, 2, 4, 8, 16):
        check_count(config, count)
    with pytest.raises(ValueError, match="its 32 heads .* Take one of 1, 2, 4, 8, 16"):
        check_count(config, 3)


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"parallel": "pipeline"}, "expected 'tensor', or None"),
        ({"device_map": "auto"}, "Leave the map out"),
        ({"max_memory": {0: "20GiB"}}, "Leave the map out"),
        ({"decoding": "compiled"}, "Take 'fast', or leave decoding out"),
    ],
)
def test_what_does_not_go_with_tensor_parallel_is_refused(options, advice):
    with pytest.raises(ValueError, match=advice):
        load_checkpoint(CHECKPOINT, **({"parallel": "tensor"} | options))


def test_a_process_that_torchrun_has_not_started_is_told_how(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="no RANK.*torchrun --nproc-per-node 2"):
        load_checkpoint(CHECKPOINT, parallel="tensor")


@pytest.mark.parametrize(("name", "value"), [("RANK", "first"), ("RANK", "2"), ("WORLD_SIZE", "")])
def test_variables_that_torchrun_would_not_set_are_refused(torchrun, monkeypatch, name, value):
    torchrun(2)
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^The environment has .*{name} '{value}'.*Let torchrun"):
        Ranks.started()


class RecordedFile:
    """A safetensors file that keeps how many numbers were read of each tensor."""

    def __init__(self, file, read):
        self.file, self.read = file, read

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def keys(self):
        return self.file.keys()

    def get_slice(self, name):
        return RecordedTensor(self.file.get_slice(name), self.read[name])


class RecordedTensor:
    def __init__(self, tensor, read):
        self.tensor, self.read, self.get_shape = tensor, read, tensor.get_shape

    def __getitem__(self, where):
        found = self.tensor[where]
        self.read.append(found.numel())
        return found


@pytest.mark.parametrize("count", [2, 4])
def test_a_rank_reads_its_part_of_the_files_and_no_more(checkpoint, monkeypatch, model, count):
    read = defaultdict(list)
    opened = loading.safe_open
    record = lambda *args, **kwargs: RecordedFile(opened(*args, **kwargs), read)  # noqa: E731
    monkeypatch.setattr(loading, "safe_open", record)
    ranks = Ranks(count - 1, count, exchanges=False)
    part = load_rank(checkpoint, read_config(checkpoint), ranks, torch.float32)
    assert sum(map(sum, read.values())) == sum(each.numel() for each in part.parameters())
    whole = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    for name, tensor in part.state_dict().items():
        module, _, kind = name.rpartition(".")
        style = style_of(module)
        is_whole = style is None or (style == "rowwise" and kind == "bias")
        parts = 1 if is_whole else count
        if "k_proj" in module or "v_proj" in module:
            parts = min(parts, model.config.multi_query_group_num)
        assert tensor.numel() == whole[name] // parts, name


@pytest.mark.parametrize("where", [(1, [(5, 10)]), (0, [(0, 2), (4, 5)])])
def test_what_does_not_lie_together_is_put_together_on_the_device(monkeypatch, where):
    monkeypatch.setattr(loading, "AT_A_TIME", 40)  # two rows at a time
    tensor = torch.arange(60.0).view(6, 10)
    dimension, ranges = where
    pieces = [tensor.narrow(dimension, start, stop - start) for start, stop in ranges]
    assert torch.equal(loading.Part(tensor, where, "cpu")[...], torch.cat(pieces, dimension))
    assert loading.Part(tensor, where, "meta")[...].is_meta


def test_transformers_own_splitting_is_refused_with_what_to_use(load):
    with pytest.raises(ValueError, match=r"^tp_plan is given.*parallel=\"tensor\""):
        load(tp_plan="auto")


def small(count: int, **sizes):
    return fit("L4", count, checkpoint=CHECKPOINT, workload=Workload(new_tokens=4), **sizes)


@pytest.fixture(scope="module")
def two_ranks():
    """The miniature, simulated, shared by two ranks."""
    return small(2, parallel="tensor")


def test_simulated_ranks_have_the_weights_that_real_ones_load(two_ranks):
    for rank, simulated in enumerate(two_ranks.devices):
        ranks = Ranks(rank, 2, exchanges=False)
        part = load_rank(CHECKPOINT, read_config(CHECKPOINT), ranks, torch.bfloat16)
        # Blocks are of 512 bytes; queries, keys and values are parts of one.
        sizes = Counter()
        for name, tensor in (*part.named_parameters(), *part.named_buffers()):
            sizes[re.sub(r"[qkv]_proj", "qkv", name)] += tensor.nbytes
        assert simulated.index == rank
        assert simulated.weights_bytes == sum(-(-size // 512) * 512 for size in sizes.values())


def test_two_ranks_need_less_than_one_process_and_more_than_half(two_ranks):
    (whole,) = small(1).devices
    (alone,) = small(1, parallel="tensor").devices
    assert alone == whole
    assert {each.peak_allocated_bytes for each in two_ranks.devices} == {
        two_ranks.devices[0].peak_allocated_bytes
    }
    for each in two_ranks.devices:
        assert whole.weights_bytes / 2 < each.weights_bytes < 0.6 * whole.weights_bytes
        assert each.peak_allocated_bytes < whole.peak_allocated_bytes


def test_the_answer_of_a_rank_without_room_names_it_and_what_all_need():
    found = small(2, parallel="tensor", free_gib=[20, 0.02])
    assert (found.verdict, found.oom.device, found.oom.phase) == ("oom", 1, "load")
    assert "GPU 1" in found.oom.message
    assert found.to_dict()["needs_bytes"] == found.needs[1] > 0
    assert "NCCL" in found.provenance


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 3}, "3 ranks cannot share this model: its 4 heads"),
        ({"parallel": "data"}, "parallel is 'data'; expected 'tensor'"),
        ({"device_map": {"": 0}}, "and there is device_map .* Leave one of the two out"),
        ({"workload": Workload(train=True, new_tokens=0)}, "and there is training"),
    ],
)
def test_a_fit_that_no_ranks_could_run_is_refused(options, message):
    given = {"count": 2, "parallel": "tensor", "checkpoint": CHECKPOINT} | options
    with pytest.raises(ValueError, match=message):
        fit("L4", **given)


def test_fast_decoding_of_ranks_takes_half_of_the_cache_on_each(two_ranks):
    one, two = small(1, decoding="fast"), small(2, parallel="tensor", decoding="fast")
    cache = one.decoding_bytes["fixed cache"]
    assert two.decoding_bytes["fixed cache"] == cache > 0
    for device, plain, purposes in zip(two.devices, two_ranks.devices, two.by_purpose, strict=True):
        assert device.weights_bytes == plain.weights_bytes == purposes["parameters"]
        assert device.peak_allocated_bytes > plain.peak_allocated_bytes
    assert two.to_dict()["decoding"]["fixed_cache_bytes"] == cache


def test_advice_passes_over_numbers_of_ranks_that_cannot_share_the_model(two_ranks, monkeypatch):
    tried = [{"count": 3}, {"count": 1}]
    monkeypatch.setattr(advice, "candidates", lambda _: iter(tried))
    assert advice.what_fits(two_ranks, list) == {"count": 1}


def test_the_command_line_shows_every_rank_and_what_is_not_counted(capsys):
    asked = ["fit", "--model", CHECKPOINT, "--card", "L4", "--count", "2", "--parallel", "tensor"]
    assert main([*asked, "--new-tokens", "1"]) == 0
    printed = capsys.readouterr().out
    assert "0 · L4" in printed and "1 · L4" in printed
    assert "each rank alone; what NCCL takes beside PyTorch's allocator is not counted" in printed
    assert main([*asked, "--limits"]) == 2
    assert "--limits searches among device maps" in capsys.readouterr().err


def test_a_model_without_a_plan_is_refused():
    config = LlamaConfig(num_hidden_layers=1, hidden_size=64, intermediate_size=64)
    with pytest.raises(ValueError, match="nothing here says how LlamaForCausalLM is split"):
        TensorParallel("L4", 2, checkpoint=config).fit()


def test_a_part_is_neither_trained_nor_saved(checkpoint, tmp_path):
    ranks = Ranks(0, 2, exchanges=False)
    model = load_rank(checkpoint, read_config(checkpoint), ranks, torch.float32)
    with pytest.raises(ValueError, match="one rank's part"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one rank's part"):
        model.resize_token_embeddings(400)
    with pytest.raises(ValueError, match="one rank's part.*merge the adapter"):
        model.load_adapter(tmp_path)
    prepared = copy.deepcopy(model.generation_config)
    prepared._pad_token_tensor = torch.tensor(0)  # as an assistant's is
    model.generate(torch.tensor([[1, 2, 3]]), prepared, max_new_tokens=1)
    with pytest.raises(ValueError, match="max_time is given.*Give max_new_tokens"):
        model.generate(torch.tensor([[1, 2, 3]]), max_time=1.0)
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match="exchange no gradients"):
        model(input_ids=torch.tensor([[1, 2, 3]]))
