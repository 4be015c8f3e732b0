"""How much memory a run takes: workloads to probe with, error messages taken apart, a log of stages."""

from glm4v_nb.memory.log import logged_stage
from glm4v_nb.memory.oom import OutOfMemoryMessage, parse_out_of_memory
from glm4v_nb.memory.probe import Workload, decode, make_prompt, prefill, train_step

__all__ = [
    "OutOfMemoryMessage",
    "Workload",
    "decode",
    "logged_stage",
    "make_prompt",
    "parse_out_of_memory",
    "prefill",
    "train_step",
]
