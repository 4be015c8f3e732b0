"""Streams and CUDA graphs of simulated cards: whose memory is whose, and what may be captured."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from rig_fixtures import MIB

from simgpu import Rig, graphs, kernels
from simgpu.oom import parse_out_of_memory

PIECE = (MIB // 4,)  # of float32: 1 MiB, of the small pool


@pytest.fixture
def rig():
    with Rig.simulated("L4", 2, "") as rig:
        yield rig


def segments(card: int = 0) -> list[tuple]:
    """Graph's pool or not, stream, size in MiB, of every segment."""
    return sorted(
        (any(each["segment_pool_id"]), each["stream"], each["total_size"] // MIB)
        for each in torch.cuda.memory_snapshot()
        if each["device"] == card
    )


def capture(graph, work, stream=None, pool=None):
    with torch.cuda.graph(graph, stream=stream or torch.cuda.Stream(), pool=pool):
        return work()


def test_a_stream_takes_no_memory_that_another_has_left(rig):
    side = torch.cuda.Stream()
    del_me = torch.empty(PIECE, device="cuda")
    del del_me
    with torch.cuda.stream(side):
        kept = torch.empty(PIECE, device="cuda")
        assert torch.cuda.current_stream() == side != torch.cuda.default_stream()
    assert segments() == [(False, 0, 2), (False, side.stream_id, 2)]
    again = torch.empty(PIECE, device="cuda")
    assert torch.cuda.memory_reserved() == 4 * MIB and kept.is_cuda and again.is_cuda
    torch.cuda.memory._record_memory_history()
    with torch.cuda.stream(side):
        torch.empty(PIECE, device="cuda")
    (events, _) = torch.cuda.memory._snapshot()["device_traces"]
    assert {each["stream"] for each in events} == {side.stream_id}
    with side:
        other = torch.empty(PIECE, device="cuda:1")  # a stream is of one card
    assert segments(1) == [(False, 0, 2)] and other.is_cuda


def test_a_card_has_32_streams_of_a_priority_and_gives_them_in_turn(rig):
    first, *others = (torch.cuda.Stream() for _ in range(33))
    assert others[-1] == first and len(set(others)) == 32
    assert torch.cuda.Stream(priority=-1) not in others
    assert torch.cuda.Stream("cuda:1").device == torch.device("cuda:1")


@pytest.mark.parametrize("alloc_conf", ["", "expandable_segments:True"])
def test_a_graphs_memory_stays_its_own_until_the_graph_is_gone(alloc_conf):
    with Rig.simulated("L4", 1, alloc_conf):
        graph = torch.cuda.CUDAGraph()
        result = capture(graph, lambda: torch.empty(PIECE, device="cuda") + 1)
        del result
        torch.cuda.empty_cache()
        assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == (0, 2 * MIB)
        plain = torch.empty(PIECE, device="cuda")
        assert torch.cuda.memory_reserved() == 4 * MIB
        del plain, graph
        assert torch.cuda.memory_reserved() == 4 * MIB
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == 0


def test_graphs_with_one_pool_share_its_memory(rig):
    first, second, stream = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    for graph, pool in ((first, None), (second, "first")):
        pool = first.pool() if pool else None
        capture(graph, lambda: torch.empty(PIECE, device="cuda"), stream, pool)
    assert segments() == [(True, stream.stream_id, 2)] and second.pool() == first.pool()
    first.reset()
    torch.cuda.empty_cache()
    assert segments() == [(True, stream.stream_id, 2)]
    del graph, second
    torch.cuda.empty_cache()
    assert segments() == []
    handle = torch.cuda.graph_pool_handle()
    third = torch.cuda.CUDAGraph()
    capture(third, lambda: None, pool=handle)
    assert third.pool() == handle


def test_the_message_of_a_full_card_names_what_graphs_keep(rig):
    graph = torch.cuda.CUDAGraph()
    capture(graph, lambda: torch.empty(16 * MIB, device="cuda"))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(2**36, device="cuda")
    text = (
        "64.00 MiB is allocated by PyTorch, with 64.00 MiB allocated in private pools (e.g., CUDA"
    )
    assert text in str(caught.value)
    assert parse_out_of_memory(caught.value).unallocated_bytes == 0


def test_nothing_cached_is_given_back_for_a_request_of_a_graph(rig):
    half = torch.empty(11 * 2**30, dtype=torch.uint8, device="cuda")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with pytest.raises(torch.OutOfMemoryError):
        with torch.cuda.graph(graph, stream=stream):
            del half  # in the cache from here on
            torch.empty(12 * 2**30, dtype=torch.uint8, device="cuda")
    assert torch.cuda.memory_reserved() == 11 * 2**30
    assert torch.empty(12 * 2**30, dtype=torch.uint8, device="cuda").is_cuda


def test_a_matrix_product_takes_a_workspace_on_each_stream(rig):
    matrix = torch.empty(64, 64, device="cuda")
    matrix @ matrix
    before = torch.cuda.memory_allocated()
    with torch.cuda.stream(torch.cuda.Stream()):
        matrix @ matrix
        matrix @ matrix
    workspace = rig.cards[0].cublas_workspace_bytes
    assert torch.cuda.memory_allocated() - before == -(-workspace // 512) * 512


@pytest.mark.parametrize(("version", "blocks"), [("2.11.0+cu130", 2), ("2.13.0+cpu", 0)])
def test_the_seed_of_a_card_is_there_as_long_as_one_graph_is(rig, monkeypatch, version, blocks):
    monkeypatch.setattr(torch, "__version__", version)
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    for graph in (first, second):
        capture(graph, lambda: None)
        assert torch.cuda.memory_allocated() == blocks * 512
    del first
    assert torch.cuda.memory_allocated() == blocks * 512
    del graph, second
    assert torch.cuda.memory_allocated() == 0
    assert Version("2.11") < graphs.SEEDS_WHEN_DRAWN


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda: torch.zeros(1, device="cuda").item(), "not permitted when stream is capturing"),
        (lambda: torch.ones(3, device="cuda").nonzero(), "nonzero waits for the card"),
        (lambda: torch.zeros(3, device="cuda").cpu(), "unless the CPU tensor is pinned"),
        (lambda: torch.tensor([1.0], device="cuda"), "unless the CPU tensor is pinned"),
    ],
)
def test_what_waits_for_the_card_is_not_captured(rig, work, said):
    with pytest.raises(RuntimeError, match=said):
        capture(torch.cuda.CUDAGraph(), work)
    assert not torch.cuda.is_current_stream_capturing()
    work()


def test_pinned_memory_and_other_streams_are_not_held_to_that(rig):
    pinned, there = torch.empty(3, pin_memory=True), torch.zeros(3, device="cuda")

    def work():
        pinned.copy_(there, non_blocking=True)
        with torch.cuda.stream(torch.cuda.default_stream()):
            return there[0].item()

    assert capture(torch.cuda.CUDAGraph(), work) == 0


def test_what_a_graph_writes_is_not_known_after_a_launch(rig):
    numbers, copied = torch.zeros(2, device="cuda"), torch.empty(2, device="cuda")
    graph = torch.cuda.CUDAGraph()

    def work():
        numbers.add_(1)
        copied.copy_(numbers)

    capture(graph, work)
    for tensor in (numbers, copied):
        tensor.fill_(5)
        assert tensor.tolist() == [5, 5]
    graph.replay()
    for tensor in (numbers, copied):
        with pytest.raises(RuntimeError, match="needs the numbers"):
            tensor.tolist()


@pytest.mark.parametrize(
    ("do", "said"),
    [
        (lambda graph: graph.replay(), "without a preceding successful capture"),
        (lambda graph: graph.pool(), "without a preceding successful capture"),
        (lambda graph: graph.capture_end(), "before capture_begin"),
        (lambda graph: graph.capture_begin(), "must be captured on a non-default stream"),
        (lambda graph: [capture(graph, lambda: None)] * 2 and capture(graph, int), "already owns"),
    ],
)
def test_graphs_are_refused_what_pytorch_refuses_them(rig, do, said):
    with pytest.raises(RuntimeError, match=said):
        do(torch.cuda.CUDAGraph())
    assert not any(allocator.captures for allocator in rig.allocators)


def without_triton(monkeypatch):
    """``simgpu.kernels`` as it is where Triton is not installed."""
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("without_triton", kernels.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kernel_of(module):
    """A kernel of Triton's, and its replacement in a rig."""

    def double(x, y):
        raise AssertionError("it ran")

    return module.triton.jit(double)


@pytest.mark.parametrize("installed", [True, False])
def test_a_launch_takes_nothing_and_what_it_may_write_is_not_known(monkeypatch, installed):
    if installed:
        pytest.importorskip("triton", reason="Triton is not installed")
    module = kernels if installed else without_triton(monkeypatch)
    monkeypatch.setattr("simgpu.intercept.kernels", module)
    kernel = kernel_of(module)
    with Rig.simulated("L4", 2, ""):
        x, y = torch.zeros(2, device="cuda"), torch.ones(2, device="cuda")
        before = torch.cuda.memory_allocated()
        kernel[(1,)](x, y)
        assert torch.cuda.memory_allocated() == before
        with pytest.raises(RuntimeError, match="needs the numbers"):
            y.tolist()
        for other in (torch.ones(2), torch.ones(2, device="cuda:1")):
            with pytest.raises(ValueError, match="launched on tensors on cuda:0 and c"):
                kernel[(1,)](x, other)
        with torch.cuda.device(1), pytest.raises(ValueError, match="cuda:1, the current card"):
            kernel[(1,)](x, x)
        assert module.launching(x) == "compiled"


def test_without_triton_kernels_of_real_tensors_are_refused(monkeypatch):
    module = without_triton(monkeypatch)
    with pytest.raises(RuntimeError, match="double is a kernel of Triton, which is not installed"):
        kernel_of(module)[(1,)](torch.ones(2), torch.ones(2))
    assert module.launching(torch.ones(2)) == ""


def test_the_models_kernels_can_be_defined_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "simgpu.kernels", without_triton(monkeypatch))
    for name in [each for each in sys.modules if each.startswith("triton.")]:
        monkeypatch.setitem(sys.modules, name, None)
    defined = {}
    # Those that others import come first: another test may have imported them with Triton.
    for name in ("inference.products", "inference.kernels", "inference.prefill_kernels",
                 "parallel.kernels"):  # fmt: skip
        file = Path(kernels.__file__).parents[1] / "glm4v_nb" / f"{name.replace('.', '/')}.py"
        spec = importlib.util.spec_from_file_location(f"glm4v_nb.{name}", file)
        defined[name] = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, defined[name])
        spec.loader.exec_module(defined[name])
    assert defined["inference.products"].gdc_wait is None
    assert defined["inference.kernels"].gdc_wait is None
    assert defined["inference.kernels"].attend.__name__ == "attend"
