"""How much memory a run takes and how to get it back: workloads, error messages, a log of stages, cleaning up."""

from glm4v_nb.memory.cleanup import FreedMemory, free_memory, with_smaller_batches
from glm4v_nb.memory.log import logged_stage
from glm4v_nb.memory.measured import MeasuredStage, measured_notebook, measured_run
from glm4v_nb.memory.oom import OutOfMemoryMessage, parse_out_of_memory
from glm4v_nb.memory.probe import Workload, decode, make_prompt, prefill
from glm4v_nb.memory.training import first_update, flop_counter, train_step, trained_parameters

__all__ = [
    "FreedMemory",
    "MeasuredStage",
    "OutOfMemoryMessage",
    "Workload",
    "decode",
    "first_update",
    "flop_counter",
    "free_memory",
    "logged_stage",
    "make_prompt",
    "measured_notebook",
    "measured_run",
    "parse_out_of_memory",
    "prefill",
    "train_step",
    "trained_parameters",
    "with_smaller_batches",
]
