"""pytest for the whole repository: which files come first, and rules for what notebooks put out.

nbval compares the cells that are marked for it, and of the others notices errors only. Whatever a
cell prints while the tests run is looked at here, so that nothing has to be executed twice.
"""

import contextlib
import gc
import os
from pathlib import Path

import pytest

# Triton decides when it is imported whether its own functions are interpreted, and libraries import
# it sooner or later. Kernels that tests start must not inherit this.
with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ImportError):
    patch.setenv("TRITON_INTERPRET", "1")
    import triton.language  # noqa: F401

ROOT = Path(__file__).parent
# Files of more than a minute, the longest first: one that starts last leaves other cores idle.
LONGEST = (
    "tests/repository/test_readme.py",
    "notebooks/11_quantise_for_one_card.ipynb",
    "tests/nbsweep/test_kills.py",
    "tests/repository/test_memory_benchmark.py",
    "notebooks/15_experiments.ipynb",
    "tests/glm4v_nb/test_fit.py",
    "tests/browser/test_panel_in_browser.py",
    "tests/glm4v_nb/test_cli.py",
    "tests/nbsweep/test_runner.py",
    "notebooks/06_training.ipynb",
    "tests/repository/test_quantising_benchmark.py",
    "tests/glm4v_nb/test_parallel.py",
    "tests/glm4v_nb/test_limits.py",
    "tests/glm4v_nb/test_advice.py",
    "tests/notebooks/test_on_gpus.py",
    "tests/nbsweep/test_dask.py",
    "tests/nbsweep/test_dask_hosts.py",
)


def pytest_configure(config):
    # Imports and assertions that are rewritten leave no garbage: see pytest_collection_finish.
    gc.disable()
    # Tests and kernels that run beside each other share the cores. Before anything imports torch,
    # which reads it then.
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))


def pytest_collection_modifyitems(items):
    places = {ROOT / name: place for place, name in enumerate(LONGEST)}
    items[:] = _with_solutions(items)
    # Then the other notebooks, which are collected last and have a kernel to start.
    later = {".ipynb": len(places)}
    items.sort(key=lambda item: places.get(item.path, later.get(item.path.suffix, len(places) + 1)))


def _with_solutions(items):
    """A notebook's folded solutions are run in its kernel, after its last cell."""
    notebooks = {item.parent: item for item in items if type(item).__name__ == "IPyNbCell"}
    if not notebooks:
        return items
    # Here, because not every test needs it.
    from notebook_rules.solutions import solution_items

    last = {item: solution_items(parent) for parent, item in notebooks.items()}
    return [each for item in items for each in (item, *last.get(item, ()))]


def pytest_collection_finish():
    # What all imports have left stays to the end. The collector, which code that watches memory
    # calls again and again, need not look at it: tests of limits take a third less processor time.
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    result = yield
    # nbval keeps here what the cell has put out; other tests have no such attribute.
    if outputs := getattr(item, "test_outputs", None):
        # Here, because not every test needs it.
        from notebook_rules.outputs import check_outputs

        problems = check_outputs(item.cell, outputs)
        if check_solution := getattr(item, "check_solution", None):
            problems += check_solution(outputs)
        if problems:
            item.raise_cell_error(
                "; ".join(f"{problem}. {advice} [{rule}]" for rule, problem, advice in problems)
            )
    return result
