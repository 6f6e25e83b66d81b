"""Comparison of state dicts, and its description in one line."""

import torch

from boxteacher.state_dicts import StateDifference, compare_states, first_names


def state(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def test_equal_entries_in_another_order_do_not_differ():
    difference = compare_states(state(a=(2,), b=()), state(b=(), a=(2,)))
    assert not difference
    assert str(difference) == ""


def test_each_kind_of_difference_is_named_with_its_first_entries():
    wanted = state(a=(2,), b=(3, 1), c=(), d=(), e=(), f=())
    given = state(a=(2,), b=(1, 3), g=())
    difference = compare_states(wanted, given)
    assert difference
    assert difference == StateDifference(missing=["c", "d", "e", "f"], unknown=["g"], reshaped=["b"])
    assert str(difference) == "4 missing (c, d, e, …), 1 unknown (g), 1 of another shape (b)"


def test_an_optional_entry_may_be_missing_but_not_of_another_shape():
    def optional(name: str) -> bool:
        return name == "mean"

    wanted = state(a=(), mean=(3,))
    assert not compare_states(wanted, state(a=()), optional=optional)
    assert compare_states(wanted, state(mean=(1,)), optional=optional) == StateDifference(["a"], [], ["mean"])


def test_a_list_of_names_ends_after_the_third():
    assert first_names(["a", "b", "c"]) == "a, b, c"
    assert first_names(["a", "b", "c", "d"]) == "a, b, c, …"
