"""``free_memory`` empties every place where memory hides in a notebook, and names the variables
that hold the rest."""

import builtins
import gc
import sys

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from rig_fixtures import GOLDEN, MIB, counters, load, split_in_two
from traitlets.config import Config

from glm4v_nb import tensor_holders
from glm4v_nb.cleanup import clear_frames, free_memory
from glm4v_nb.tensor_holders import bytes_on_cards, find_holders, tensors_in
from simgpu import Rig

KEPT_BY_SYS = ("last_exc", "last_type", "last_value", "last_traceback")
# What runs these tests, as IPython runs a notebook; it leads to every test there is.
MACHINERY = (*tensor_holders._MACHINERY, "_pytest", "pluggy", "pytest", "xdist", "execnet")


@pytest.fixture(autouse=True)
def without_pytest(monkeypatch):
    monkeypatch.setattr(tensor_holders, "_MACHINERY", MACHINERY)


@pytest.fixture
def rig():
    with Rig("L4", 2) as rig:
        yield rig


@pytest.fixture
def shell(monkeypatch, capsys):
    """IPython as a notebook's kernel has it, without a history file."""
    for module, name in ((sys, "displayhook"), (sys, "excepthook"), (builtins, "get_ipython")):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "nocolor"  # a coloured traceback takes half a second
    shell = InteractiveShell.instance(config=config)
    shell.run_cell("import torch\nfrom glm4v_nb.cleanup import free_memory")
    yield shell
    shell.reset()
    for name in KEPT_BY_SYS:
        if hasattr(sys, name):
            delattr(sys, name)
    InteractiveShell.clear_instance()


def allocated(rig) -> list[int]:
    return [card.allocated_bytes for card in rig.memory()]


def tensor_of(mebibytes: int, card: int = 0):
    return torch.empty(mebibytes * MIB, dtype=torch.uint8, device=f"cuda:{card}")


def failing():
    working_space = tensor_of(3)
    raise RuntimeError(f"no room beside {working_space.nbytes} bytes")


FAILING_CELL = """
def failing():
    working_space = torch.empty(3 * 2**20, dtype=torch.uint8, device="cuda:0")
    raise RuntimeError("no room")

failing()
"""


def kept_error():
    """An error whose frames hold 3 MiB on card 0."""
    try:
        failing()
    except RuntimeError as error:
        return error


def test_an_error_does_not_lead_to_the_tensor_there_was_no_room_for(rig):
    held = torch.empty(15 * 2**30, dtype=torch.uint8, device="cuda")
    with pytest.raises(torch.OutOfMemoryError) as failed:
        held + 1
    assert bytes_on_cards(tensors_in(failed.value)) == {0: 15 * 2**30}


# --- the hiding places, each alone


@pytest.mark.parametrize("name", ["last_exc", "last_value"])
def test_what_sys_keeps_of_an_error_is_given_back(rig, shell, name):
    setattr(sys, name, kept_error())
    assert allocated(rig) == [3 * MIB, 0]
    report = free_memory()
    assert allocated(rig) == [0, 0]
    assert report.cleared == [f"sys.{name} (RuntimeError)"]
    assert not hasattr(sys, name)


def test_a_traceback_that_only_sys_keeps_is_given_back(rig, shell):
    sys.last_traceback = kept_error().__traceback__
    assert allocated(rig) == [3 * MIB, 0]
    free_memory()
    assert allocated(rig) == [0, 0]


@pytest.mark.parametrize("name", ["tb", "evalue"])
def test_what_ipython_keeps_to_show_tracebacks_is_given_back(rig, shell, name):
    error = kept_error()
    setattr(shell.InteractiveTB, name, error.__traceback__ if name == "tb" else error)
    del error
    assert allocated(rig) == [3 * MIB, 0]
    free_memory()
    assert allocated(rig) == [0, 0]


def test_the_error_in_ipythons_last_result_is_given_back_and_stays_an_error(rig, shell):
    result = shell.run_cell("1 + 1")
    result.error_in_exec = kept_error()
    assert shell.last_execution_result is result
    assert allocated(rig) == [3 * MIB, 0]
    report = free_memory()
    assert allocated(rig) == [0, 0]
    assert report.cleared == ["last_execution_result.error_in_exec (RuntimeError)"]
    assert not result.success


def test_the_error_being_handled_is_given_back(rig):
    try:
        failing()
    except RuntimeError:
        assert allocated(rig) == [3 * MIB, 0]
        free_memory()
        assert allocated(rig) == [0, 0]


def test_everything_an_uncaught_error_of_a_cell_leaves_is_given_back(rig, shell):
    shell.run_cell(FAILING_CELL)
    assert allocated(rig) == [3 * MIB, 0]
    free_memory()
    assert allocated(rig) == [0, 0]


@pytest.mark.parametrize("later_cells", [[], ["0"], ["0", "0", "0"], ["_ = 'mine'"]])
def test_the_output_history_is_given_back(rig, shell, later_cells):
    shell.run_cell(
        "torch.ones(3 * 2**20, dtype=torch.uint8, device='cuda:1').shape; 0", store_history=True
    )
    shell.run_cell(
        "[torch.empty(3 * 2**20, dtype=torch.uint8, device='cuda:1')]", store_history=True
    )
    for cell in later_cells:
        shell.run_cell(cell, store_history=True)
    gc.collect()
    assert allocated(rig) == [0, 3 * MIB]
    report = free_memory()
    assert allocated(rig) == [0, 0]
    assert "Out[2] (list)" in report.cleared


def test_results_of_cells_that_hold_nothing_on_cards_stay_in_the_history(rig, shell):
    shell.run_cell("'a result'", store_history=True)
    shell.run_cell("torch.empty(2**20, device='cuda:0')", store_history=True)
    free_memory()
    assert shell.user_ns["Out"] == {1: "a result"}
    assert shell.user_ns["_1"] == "a result"


@pytest.mark.parametrize("place", ["_", "__", "___"])
def test_the_last_three_results_are_given_back(rig, shell, place):
    value = tensor_of(3)
    setattr(shell.displayhook, place, value)
    shell.user_ns[place] = shell.user_ns_hidden[place] = value
    del value
    free_memory()
    assert allocated(rig) == [0, 0]
    assert shell.user_ns[place] == ""


def test_what_ipythons_own_flush_leaves_is_given_back(rig, shell):
    shell.run_cell("torch.empty(2**20, device='cuda:0')", store_history=True)
    shell.run_cell("0", store_history=True)
    shell.displayhook.flush()
    shell.last_execution_result = None
    assert allocated(rig) == [4 * MIB, 0]
    free_memory()
    assert allocated(rig) == [0, 0]


def test_the_result_of_the_last_cell_is_given_back(rig, shell):
    shell.run_cell("1").result = tensor_of(3)
    free_memory()
    assert allocated(rig) == [0, 0]


def test_the_result_the_display_hook_is_filling_is_given_back(rig, shell):
    shell.displayhook.exec_result = shell.run_cell("1")
    shell.last_execution_result = None
    shell.displayhook.exec_result.result = tensor_of(3)
    free_memory()
    assert allocated(rig) == [0, 0]


def test_cycles_that_accelerates_hooks_leave_are_given_back(rig):
    gc.disable()  # or it may come by itself
    try:
        model = load(device_map=split_in_two())
        del model
        assert min(allocated(rig)) > 0
        free_memory()
        assert allocated(rig) == [0, 0]
    finally:
        gc.enable()


def test_cached_memory_is_given_back_inside_the_block_and_outside_of_it():
    rig = Rig("L4", 2)
    for inside in (True, False):
        with rig:
            tensor = tensor_of(30)
            del tensor
            assert rig.memory()[0].reserved_bytes == 30 * MIB
            report = free_memory() if inside else None
        report = report or free_memory(rig)
        assert [card.reserved_bytes for card in rig.memory()] == [0, 0]
        assert [card.reserved_bytes for card in report.before] == [30 * MIB, 0]


# --- what stays, and its name


def test_the_report_names_the_variables_that_hold_memory_and_deletes_none(rig, shell):
    shell.user_ns["model"] = load(device_map=split_in_two())
    shell.user_ns["kept"] = {"step": [tensor_of(2, card=1)]}
    names, before = set(shell.user_ns), allocated(rig)
    report = free_memory()
    held = {holder.name: holder for holder in report.holders}
    assert list(held) == ["kept", "model"]
    assert str(held["kept"]) == "kept (dict): 2.0 MiB on card 1"
    assert held["model"].kind == "GLM4VForConditionalGeneration"
    parameters = [*shell.user_ns["model"].parameters(), *shell.user_ns["model"].buffers()]
    for card in (0, 1):
        # Queries, keys and values of a layer are parts of one storage.
        storages = [each.untyped_storage() for each in parameters if each.device.index == card]
        expected = {storage._cdata: storage.nbytes() for storage in storages}
        assert held["model"].bytes[card] == sum(expected.values())
    assert allocated(rig) == before
    assert set(shell.user_ns) == names
    assert "kept (dict): 2.0 MiB on card 1" in repr(report)


def test_an_error_of_the_users_own_is_named_and_left_as_it_is(rig, shell):
    shell.user_ns["error"] = kept_error()
    report = free_memory()
    assert [str(holder) for holder in report.holders] == ["error (RuntimeError): 3.0 MiB on card 0"]
    clear_frames(shell.user_ns["error"])
    assert free_memory().holders == []


def test_gradients_and_what_closures_and_classes_of_the_notebook_hold_are_named(rig, shell):
    weight = torch.nn.Parameter(torch.empty(MIB, dtype=torch.float16, device="cuda:0"))
    weight.grad = torch.empty_like(weight)
    shell.user_ns["weight"] = weight
    shell.user_ns["closure"] = (lambda captured: lambda: captured)(tensor_of(3))
    shell.user_ns["Store"] = type("Store", (), {"tensor": tensor_of(5)})
    del weight
    assert {holder.name: holder.bytes[0] // MIB for holder in free_memory().holders} == {
        "Store": 5,
        "weight": 4,
        "closure": 3,
    }


def test_a_function_of_the_notebook_is_not_blamed_for_the_notebooks_variables(rig, shell):
    shell.run_cell("tensor = torch.empty(2**20, device='cuda:0')\ndef function(): return tensor")
    assert [holder.name for holder in free_memory().holders] == ["tensor"]


def test_a_variable_of_a_running_function_is_named_and_can_be_deleted_after(rig, shell):
    workspace = tensor_of(3)
    report = free_memory()
    assert [holder.bytes for holder in report.holders] == [{0: 3 * MIB}]
    assert report.holders[0].name.startswith(
        "workspace in test_a_variable_of_a_running_function_is_named_and_can_be_deleted_after of "
        "test_free_memory.py:"
    )
    del workspace  # the look at the function's variables must not have kept it
    assert allocated(rig) == [0, 0]


def test_a_global_of_another_module_is_named(rig, shell, monkeypatch):
    monkeypatch.setattr(sys.modules[Rig.__module__], "forgotten", tensor_of(3), raising=False)
    assert [holder.name for holder in free_memory().holders] == [f"{Rig.__module__}.forgotten"]


def test_memory_without_any_name_is_reported_too(rig, shell):
    generator = (tensor for tensor in [tensor_of(3)])
    next(generator)
    cell = [generator]
    cell.append(cell)
    hidden = {"cell": cell}
    del generator, cell
    holders = find_holders({"cell": hidden["cell"]}, hidden, outermost=sys._getframe(0).f_back)
    assert [str(holder) for holder in holders] == [
        f"1 tensors no variable leads to, the largest ({3 * MIB},) (unnamed): 3.0 MiB on card 0"
    ]


# --- rounds


def test_twenty_errors_and_recoveries_in_a_notebook_end_at_the_same_byte_on_every_card(shell):
    shell.user_ns.update(rig=Rig("L4", 2), golden=GOLDEN, load=load, split=split_in_two())
    shell.run_cell("from glm4v_nb.workload import Workload, make_prompt, prefill")
    shell.run_cell("with rig: model = load(golden, device_map=split)")
    # Leaves less than the 0.37 GiB that the prefill below takes on card 0.
    shell.run_cell(
        "with rig: filler = torch.empty(21 * 2**30 + 2**29, dtype=torch.uint8, device='cuda:0')"
    )
    ends = []
    for _ in range(20):
        shell.run_cell(
            "with rig:\n    prefill(model, make_prompt(model, Workload(batch_size=2**12)))",
            store_history=True,
        )
        assert isinstance(shell.last_execution_result.error_in_exec, torch.OutOfMemoryError)
        shell.run_cell("free_memory(rig)", store_history=True)
        assert shell.last_execution_result.success
        ends.append([(now[0], now[2]) for now in counters(shell.user_ns["rig"])])
    assert ends == ends[:1] * 20
    shell.run_cell("del model, filler\nfree_memory(rig)")
    workspace = Rig("L4").card.cublas_workspace_bytes
    assert all(card.allocated_bytes <= workspace for card in shell.user_ns["rig"].memory())
