"""What leaves a simulation: numbers that are known, and of others one sentence."""

import io

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from simgpu import Rig

SMALL = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)


@pytest.fixture(autouse=True)
def rig():
    with Rig.simulated("L4", 2) as rig:
        yield rig


def known():
    return torch.tensor([1, 2], device="cuda:1")


def unknown():
    return torch.randn(3, device="cuda")


def test_known_numbers_go_to_numpy_and_text():
    assert known().cpu().numpy().tolist() == known().numpy(force=True).tolist() == [1, 2]
    assert np.mean(np.asarray(known().cpu())) == 1.5
    assert f"{torch.tensor(3.14159, device='cuda'):.2f}" == "3.14"
    assert repr(known()) == str(known()) == f"{known()}" == "tensor([1, 2], device='cuda:1')"
    with pytest.raises(TypeError, match="can't convert cuda:1 .*Use Tensor.cpu()"):
        known().numpy()


def test_a_tensor_without_numbers_is_printed_with_what_it_has():
    assert repr(unknown()) == "tensor(..., device='cuda:0', size=(3,))"
    assert f"{unknown()}" == repr(unknown())
    assert unknown().type() == "torch.cuda.FloatTensor"


def test_the_old_names_of_tensors_on_a_card_make_move_and_test_them():
    assert torch.cuda.LongTensor([1, 2]).tolist() == [1, 2]
    assert torch.cuda.HalfTensor(2, 3).shape == (2, 3)
    for kind in (torch.cuda.HalfTensor, "torch.cuda.HalfTensor"):
        moved = torch.ones(3).type(kind)
        assert (moved.is_cuda, moved.dtype) == (True, torch.float16)
    assert isinstance(moved, torch.cuda.HalfTensor)
    assert not isinstance(torch.ones(3), torch.cuda.FloatTensor)


ASKING = {
    "numpy": lambda: unknown().cpu().numpy(),
    "an array": lambda: np.asarray(unknown().cpu()),
    "a format": lambda: f"{unknown().sum():.2f}",
    "a float": lambda: float(unknown()[0]),
    "dlpack": lambda: torch.from_dlpack(unknown()),
    "torch.save": lambda: torch.save({"a": unknown()}, io.BytesIO()),
    "a state dict": lambda: torch.save(nn.Linear(2, 2).cuda().state_dict(), io.BytesIO()),
    "safetensors": lambda: save_file({"a": unknown().cpu()}, "never.safetensors"),
    "save_pretrained": lambda: LlamaForCausalLM(SMALL).cuda().save_pretrained("never"),
    "sparse": lambda: unknown().to_sparse(),
    "sparse from lists": lambda: torch.sparse_coo_tensor([[0], [1]], [1.0], device="cuda"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], device="cuda"),
    "torch.export": lambda: torch.export.export(nn.Linear(2, 2).cuda(), (unknown(),)),
    "torch.jit.trace": lambda: torch.jit.trace(nn.ReLU(), unknown()),
    "a pool of memory": lambda: torch.cuda.MemPool(),
    "a function for each number": lambda: unknown().cpu().apply_(lambda number: number + 1),
    "a sensor": lambda: torch.cuda.utilization(),
}


@pytest.mark.parametrize("how", ASKING)
def test_what_has_no_numbers_to_give_says_so_in_a_sentence_on_simulation(how):
    with pytest.raises(RuntimeError, match="(?s)simulat.*(real device|leave it out|without it)"):
        ASKING[how]()


def test_known_numbers_are_saved_and_come_back_to_their_card(tmp_path):
    torch.save({"a": known(), "b": torch.ones(1)}, tmp_path / "both.pt")
    back = torch.load(tmp_path / "both.pt")
    assert (str(back["a"].device), str(back["b"].device)) == ("cuda:1", "cpu")
    assert back["a"].tolist() == [1, 2]
    assert torch.load(tmp_path / "both.pt", map_location="cpu")["a"].numpy().tolist() == [1, 2]
    save_file({"a": known()}, tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [1, 2]


def test_numbers_that_an_optimizer_or_a_norm_overwrites_are_known_no_longer():
    layer = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).cuda()
    for options in ({"fused": True}, {"foreach": True}, {"foreach": False}):
        optimizer = torch.optim.AdamW(layer.parameters(), **options)
        layer(torch.randn(3, 2, device="cuda")).sum().backward()
        optimizer.step()
        for name in ("exp_avg", "exp_avg_sq"):
            with pytest.raises(RuntimeError, match="simulated"):
                optimizer.state[layer[0].weight][name].tolist()
    with pytest.raises(RuntimeError, match="simulated"):
        layer[1].running_mean.tolist()


def test_what_has_only_a_shape_to_start_from_has_numbers_all_the_same():
    assert torch.zeros_like(unknown()).tolist() == unknown().new_zeros(3).tolist() == [0, 0, 0]
    assert unknown().new_full((2,), 7).tolist() == [7, 7]
    assert set(torch.randint(4, 6, (50,), device="cuda").tolist()) == {4, 5}


def test_a_compiled_model_runs_as_it_is_and_says_so():
    with pytest.warns(UserWarning, match="torch.compile runs the model as it is"):
        model = torch.compile(nn.Linear(3, 2).cuda(), backend="eager")
    assert model(unknown()).shape == (2,)


def test_weights_on_disk_come_to_the_card_when_they_are_needed(tmp_path):
    SMALL.save_pretrained(tmp_path)
    places = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    places |= {"model.layers.0": 0, "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=places, offload_folder=tmp_path / "offload"
    )
    before = torch.cuda.memory_allocated()
    model(torch.ones(1, 3, dtype=torch.long, device="cuda"), use_cache=False)
    layer = model.model.layers[1]
    assert {each.device.type for each in layer.parameters()} == {"meta"}
    assert torch.cuda.max_memory_allocated() - before > 32 * 32 * 4 * 3
    assert not list((tmp_path / "offload").glob("*.dat"))


def test_an_operator_without_a_shape_rule_is_tried_on_the_cpu():
    weights, edges = torch.histogram(unknown(), 5)
    assert (weights.shape, edges.shape, weights.is_cuda) == ((5,), (6,), True)


def test_sequences_of_unequal_length_are_one_tensor():
    parts = [torch.randn(3, 4, device="cuda"), torch.randn(5, 4, device="cuda")]
    together = torch.nested.nested_tensor(parts, layout=torch.jagged)
    assert (together * 2).values().shape == (8, 4)


def test_matrices_of_two_types_are_refused_as_on_cuda():
    for product in (torch.mm, torch.mv, torch.bmm):
        left = torch.ones(2, 2, 2)[: 2 if product is torch.bmm else 1].squeeze(0).cuda()
        right = torch.ones(2, 2, 2).half().cuda()
        right = {torch.mm: right[0], torch.mv: right[0, 0], torch.bmm: right}[product]
        with pytest.raises(RuntimeError, match="same dtype"):
            product(left, right)


def test_pinned_memory_takes_what_has_no_numbers():
    pinned = torch.empty(3, pin_memory=True)
    assert pinned.is_pinned() and pinned.copy_(torch.ones(3)).tolist() == [1, 1, 1]
    pinned.copy_(unknown())
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        result = (unknown().requires_grad_() * 2).exp()
    result.sum().backward()


def test_a_function_that_says_where_a_storage_goes_may_name_a_card(tmp_path):
    torch.save(torch.ones(2), tmp_path / "a.pt")
    back = torch.load(tmp_path / "a.pt", map_location=lambda storage, place: storage.cuda(1))
    assert (str(back.device), back.tolist()) == ("cuda:1", [1, 1])


def test_a_script_is_compiled_inside_the_block_as_outside():
    again = torch.jit.script(_plain)
    assert again(torch.ones(2)).tolist() == [1, 1]


def _plain(tensor: torch.Tensor):
    return tensor + torch.zeros(2)
