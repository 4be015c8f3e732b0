"""What people write with "cuda" means the simulated cards, wherever they write it."""

import io
import pickle
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from simgpu import Rig
from simgpu.units import MIB


@pytest.fixture
def rig():
    with Rig.simulated("L4", 2) as rig:
        yield rig


def in_a_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


MAKING = {
    "a factory": lambda: torch.zeros(3, device="cuda:1"),
    "a number": lambda: torch.ones(3, device=1),
    "a device": lambda: torch.empty(3, device=torch.device("cuda", 1)),
    "data": lambda: torch.tensor([1.0, 2.0, 3.0], device="cuda:1"),
    "as_tensor": lambda: torch.as_tensor([1.0, 2.0, 3.0], device="cuda:1"),
    "to": lambda: torch.zeros(3).to("cuda:1"),
    "to with a type": lambda: torch.zeros(3).to(torch.device("cuda:1"), torch.float32),
    "to like another": lambda: torch.zeros(3).to(torch.zeros(1, device="cuda:1")),
    "cuda": lambda: torch.zeros(3).cuda(1),
    "like another": lambda: torch.zeros_like(torch.zeros(3), device="cuda:1"),
    "new": lambda: torch.zeros(1, device="cuda:1").new_zeros(3),
    "new with data": lambda: torch.zeros(1, device="cuda:1").new_tensor([1.0, 2.0, 3.0]),
    "a module": lambda: torch.nn.LayerNorm(3, device="cuda:1").weight,
}


@pytest.mark.parametrize("make", MAKING.values(), ids=MAKING.keys())
@pytest.mark.parametrize("call", [lambda make: make(), in_a_thread], ids=["here", "in a thread"])
def test_cuda_is_a_simulated_card_and_says_so(rig, make, call):
    tensor = call(make)
    assert tensor.is_cuda
    assert tensor.device == torch.device("cuda:1")
    assert tensor.device.type == "cuda"
    assert tensor.get_device() == 1
    assert "cuda:1" in repr(tensor)
    assert torch.cuda.memory_allocated(1) == 512
    assert torch.cuda.memory_allocated(0) == 0


def test_the_current_card_is_each_threads_own_and_a_block_gives_it_back(rig):
    with torch.cuda.device(1):
        assert torch.cuda.current_device() == 1
        assert torch.zeros(1, device="cuda").get_device() == 1
        assert in_a_thread(torch.cuda.current_device) == 0
    torch.cuda.set_device(1)
    assert torch.zeros(1).cuda().get_device() == 1
    with pytest.raises(RuntimeError, match="invalid device ordinal.*cuda:2"):
        torch.cuda.set_device(2)


def test_a_default_device_takes_data_and_shapes(rig):
    torch.set_default_device("cuda:1")
    try:
        assert torch.tensor([1, 2]).get_device() == torch.zeros(3).get_device() == 1
    finally:
        torch.set_default_device(None)
    with torch.device("cuda"):
        assert torch.tensor([1]).is_cuda
    assert not torch.tensor([1]).is_cuda


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.full((1,), 2.0, device="cuda")


def test_functions_hooks_and_recomputed_layers_may_name_cuda(rig):
    x = torch.zeros(4, device="cuda", requires_grad=True)
    x.register_hook(lambda gradient: gradient + torch.ones(4, device="cuda"))
    layer = lambda x: (Twice.apply(x) + torch.arange(4, device="cuda")).sin()  # noqa: E731
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert x.grad.device == torch.device("cuda:0")


def failing_checkpoint(x, fail):
    calls = []

    def layer(x):
        calls.append(x)
        return x.sin() if len(calls) == 1 else fail()

    return checkpoint(layer, x, use_reentrant=False)


def failing_hook(x, fail):
    x.register_hook(fail)
    return x


def failing_module(x, fail):
    module = torch.nn.Linear(4, 4, device="cuda")
    module.register_full_backward_hook(fail)
    return module(x)


def failing_accumulation(x, fail):
    weight = torch.zeros(4, device="cuda", requires_grad=True)
    weight.register_post_accumulate_grad_hook(fail)
    return x * weight


def failing_saved_tensor(x, fail):
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, fail):
        return x.sin()


FAILING = [
    failing_checkpoint,
    failing_hook,
    failing_module,
    failing_accumulation,
    failing_saved_tensor,
]


@pytest.mark.parametrize("failing", FAILING)
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_error_in_a_backward_pass_is_raised_and_the_next_pass_works(rig, failing, error):
    def fail(*anything):
        raise error("what the hook says")

    x = torch.zeros(2, 4, device="cuda", requires_grad=True)
    with pytest.raises(error, match="what the hook says"):
        failing(x * 2, fail).sum().backward()
    x.grad = None
    (x * 3).sum().backward()
    assert x.grad.shape == (2, 4)


def test_memory_that_runs_out_in_a_recomputation_ends_the_pass(rig):
    torch.cuda.set_per_process_memory_fraction(24 * MIB / torch.cuda.mem_get_info()[1])
    x = torch.zeros(2**20, device="cuda", requires_grad=True)
    calls = []

    def layer(x):
        calls.append(x)
        more = torch.empty(2**10 if len(calls) == 1 else 2**25, device="cuda")
        return x.sin().cos() + more[0]

    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        checkpoint(layer, x, use_reentrant=False).sum().backward()


def test_a_module_keeps_its_parameters_ties_and_optimizer(rig):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model[1].weight = model[0].weight
    before, optimizer = list(model.parameters()), torch.optim.AdamW(model.parameters())
    model.cuda()
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    assert model[0].weight is model[1].weight
    assert torch.cuda.memory_allocated() == 3 * 512  # one weight, two biases
    model(torch.zeros(2, 8, device="cuda")).sum().backward()
    optimizer.step()
    assert all(state["exp_avg"].is_cuda for state in optimizer.state.values())


def test_data_of_a_parameter_may_be_put_on_a_card(rig):
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.data = parameter.data.cuda()
    assert parameter.is_cuda
    assert isinstance(parameter, torch.nn.Parameter)


def test_statistics_count_what_was_allocated_and_freed(rig):
    kept = torch.zeros(3 * MIB, dtype=torch.uint8, device="cuda")
    gone = torch.zeros(5, device="cuda")
    del gone
    stats = torch.cuda.memory_stats()
    assert stats["allocated_bytes.all.current"] == kept.nbytes == 3 * MIB
    assert stats["allocated_bytes.all.peak"] == 3 * MIB + 512
    assert stats["allocated_bytes.all.allocated"] == 3 * MIB + 512
    assert stats["allocated_bytes.small_pool.freed"] == 512
    assert stats["requested_bytes.small_pool.allocated"] == 20
    assert stats["allocation.all.current"] == 1
    assert stats["segment.all.current"] == 2
    assert stats["reserved_bytes.all.current"] == torch.cuda.memory_reserved() == 22 * MIB
    assert stats["num_ooms"] == 0
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(2**40, device="cuda")
    assert torch.cuda.memory_stats()["num_ooms"] == 1
    assert "22528 KiB" in torch.cuda.memory_summary()
    torch.cuda.reset_accumulated_memory_stats()
    assert torch.cuda.memory_stats()["allocated_bytes.all.allocated"] == 0
    assert torch.accelerator.memory_allocated() == 3 * MIB
    assert torch.accelerator.current_accelerator() == torch.device("cuda")
    assert torch.accelerator.device_count() == 2


def test_a_snapshot_holds_every_segment_and_block(rig, tmp_path):
    kept = torch.zeros(3 * MIB, dtype=torch.uint8, device="cuda:1")
    torch.cuda.memory._dump_snapshot(str(tmp_path / "snapshot.pickle"))
    found = pickle.loads((tmp_path / "snapshot.pickle").read_bytes())
    (segment,) = found["segments"]
    assert segment["device"] == 1
    assert segment["total_size"] == 20 * MIB
    used, free = segment["blocks"]
    assert (used["state"], used["size"]) == ("active_allocated", kept.nbytes)
    assert (free["state"], free["size"]) == ("inactive", 17 * MIB)
    assert free["address"] == used["address"] + used["size"]


def test_torch_load_puts_tensors_where_they_are_wanted(rig):
    file = io.BytesIO()
    torch.save({"a": torch.ones(3), "b": [torch.arange(2)]}, file)
    for place in ("cuda:1", torch.device("cuda:1"), {"cpu": "cuda:1"}):
        file.seek(0)
        loaded = torch.load(file, map_location=place)
        assert loaded["a"].device == loaded["b"][0].device == torch.device("cuda:1")
    file.seek(0)
    assert not torch.load(file)["a"].is_cuda


def test_a_replicated_module_answers_from_both_cards(rig):
    model = torch.nn.DataParallel(torch.nn.Linear(256, 256, bias=False).cuda())
    answer = model(torch.zeros(8, 256, device="cuda"))
    assert (answer.shape, answer.get_device()) == ((8, 256), 0)
    peak = torch.cuda.max_memory_allocated(1)
    assert peak >= 256 * 256 * 4, "a copy of the weights"


def test_streams_events_generators_and_pinned_batches_are_there(rig):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="simulated cards do no work"):
        start.elapsed_time(end)
    torch.cuda.manual_seed_all(1)
    generator = torch.Generator("cuda:1")
    assert generator.device == torch.device("cuda:1")
    assert torch.randn(3, device="cuda:1", generator=generator).is_cuda
    batches = torch.utils.data.DataLoader([torch.zeros(3)], pin_memory=True)
    assert next(iter(batches)).is_pinned()


def test_numbers_are_not_lost_in_silence(rig):
    totals = torch.ones(3)
    unknown = torch.randn(3, device="cuda")
    for write in (
        lambda: totals.add_(unknown.cpu()),
        lambda: totals.copy_(unknown),
        lambda: totals.__setitem__(slice(None), unknown),
        lambda: torch.add(unknown.cpu(), 1, out=totals),
    ):
        with pytest.raises(RuntimeError, match="without numbers into a tensor on the CPU"):
            write()
    assert totals.tolist() == [1, 1, 1]


def test_a_meta_module_does_not_move_to_a_card(rig):
    with torch.device("meta"):
        module = torch.nn.Linear(2, 2)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        module.to("cuda")
    assert module.to_empty(device="cuda").weight.is_cuda


def test_after_the_block_a_machine_without_gpus_has_none():
    with Rig.simulated("L4"):
        torch.zeros(1, device="cuda")
    if not torch.cuda.is_available():
        for device in (0, "cuda"):
            with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|cuda"):
                torch.zeros(3).to(device)
        assert torch.cuda.device_count() == 0
