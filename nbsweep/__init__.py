"""Reruns notebooks: with other parameters, many times, on several machines, and reports it.

Every name is loaded when it is first used: a notebook that only records figures loads no more.
"""

import importlib

_HOMES = {
    "carry_out": "runner",
    "compare": "compare",
    "plan_file": "plan",
    "plan_notebook": "plan",
    "plan_suite": "plan",
    "predict": "plan",
    "print_runs": "display",
    "read_sweep": "store",
    "record": "records",
    "write_comparison": "report",
    "write_report": "report",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'nbsweep' has no attribute {name!r}")
    return getattr(importlib.import_module(f"nbsweep.{_HOMES[name]}"), name)
