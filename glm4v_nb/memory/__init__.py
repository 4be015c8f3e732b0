"""How much memory a run takes: workloads to probe with."""

from glm4v_nb.memory.oom import OutOfMemoryMessage, parse_out_of_memory
from glm4v_nb.memory.probe import Workload, decode, make_prompt, prefill, train_step

__all__ = [
    "OutOfMemoryMessage",
    "Workload",
    "decode",
    "make_prompt",
    "parse_out_of_memory",
    "prefill",
    "train_step",
]
