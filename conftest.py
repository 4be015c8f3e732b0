"""pytest, for the notebooks that nbval executes: what a cell puts out must keep the rules of the
stored outputs.

nbval compares the cells that are marked for it, and of the others notices errors only. Whatever a
cell prints while the tests run is looked at here, so that nothing has to be executed twice.
"""

import os

import pytest


def pytest_configure(config):
    # Tests and kernels that run beside each other share the cores. Before anything imports torch,
    # which reads it then.
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    result = yield
    # nbval keeps here what the cell has put out; other tests have no such attribute.
    if outputs := getattr(item, "test_outputs", None):
        # Here, because not every test needs it.
        from notebook_rules.outputs import check_outputs

        if problems := check_outputs(item.cell, outputs):
            item.raise_cell_error(
                "; ".join(f"{problem}. {advice} [{rule}]" for rule, problem, advice in problems)
            )
    return result
