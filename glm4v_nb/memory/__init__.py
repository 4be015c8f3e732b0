"""How much memory a run takes: workloads to probe with."""

from glm4v_nb.memory.probe import Workload, decode, make_prompt, prefill, train_step

__all__ = ["Workload", "decode", "make_prompt", "prefill", "train_step"]
