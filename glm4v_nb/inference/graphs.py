"""CUDA graphs: what a function launches, recorded once and launched again in one go."""

from collections.abc import Callable

import torch


def captured(run: Callable[[], None], device: torch.device, pool=None) -> torch.cuda.CUDAGraph:
    """A graph of what ``run`` launches on ``device``; it runs once before, to load its kernels."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on asking CUDA, as the panel for memory.
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            run()
    return graph


def milliseconds(graph: torch.cuda.CUDAGraph, device: torch.device, times: int = 9) -> float:
    """The median of a few launches, by the card's clock."""
    measured = []
    with torch.cuda.device(device):
        graph.replay()
        for _ in range(times):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            measured.append(begin.elapsed_time(end))
    return sorted(measured)[times // 2]
