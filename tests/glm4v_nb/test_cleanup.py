"""What errors hold is given back."""

import traceback
import weakref

import pytest

from glm4v_nb.cleanup import clear_frames


class Tensor:
    """Stands for one; a weak reference tells whether it is still there."""


def failing(held: list, cause: Exception | None = None):
    tensor = Tensor()
    held.append(weakref.ref(tensor))
    raise ValueError("no room") from cause


@pytest.mark.parametrize(
    "looked_at", [False, True], ids=["as raised", "after its locals were shown"]
)
def test_a_kept_error_holds_nothing_of_its_frames_and_keeps_its_text(looked_at):
    held = []
    with pytest.raises(ValueError) as kept:
        failing(held)
    if looked_at:  # as IPython does to print its traceback
        locals_shown = [
            str(frame.f_locals) for frame, _ in traceback.walk_tb(kept.value.__traceback__)
        ]
        assert "Tensor" in locals_shown[-1]
    assert held[0]() is not None
    clear_frames(kept.value)
    assert held[0]() is None
    assert "failing(held)" in "".join(traceback.format_exception(kept.value))


def test_the_errors_it_came_from_are_cleared_too():
    held = []
    with pytest.raises(ValueError) as first:
        failing(held)
    with pytest.raises(ValueError) as second:
        failing(held, cause=first.value)
    clear_frames(second.value)
    assert [reference() for reference in held] == [None, None]


def test_an_error_being_handled_is_cleared_behind_another_cause():
    held = []
    with pytest.raises(RuntimeError) as kept:
        try:
            failing(held)
        except ValueError:
            raise RuntimeError("not served") from KeyError("batch 16")
    clear_frames(kept.value)
    assert held[0]() is None


def test_the_errors_of_a_group_are_cleared_and_those_that_are_arguments():
    held, errors = [], []
    for _ in range(2):
        with pytest.raises(ValueError) as one:
            failing(held)
        errors.append(one.value)
    del one
    clear_frames(ExceptionGroup("both", [errors[0], RuntimeError("worker 1", errors[1])]))
    assert [reference() for reference in held] == [None, None]


@pytest.mark.timeout(20)
def test_a_chain_that_leads_back_to_itself_ends():
    held = []
    with pytest.raises(ValueError) as kept:
        failing(held)
    other = KeyError("again")
    kept.value.__cause__, other.__cause__ = other, kept.value
    clear_frames(kept.value)
    assert held[0]() is None
