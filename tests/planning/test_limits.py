"""What plans refuse, and that each message names what would be possible."""

from collections.abc import Callable
from typing import Any

import pytest
import small

import treeify
from treeify.errors import InputError, SplitError
from treeify.planning.limits import Budget, amount, limits, numbers_of_leaves
from treeify.planning.plan import plan
from treeify.planning.split_plan import SplitPlan


def planned(**asked: Any) -> SplitPlan:
    return plan(small.build(), example_input=small.EXAMPLE, **{"leaves": (2, 8), **asked})


BASE = planned().base.macs


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"first_macs": 2e6, "max_macs": 1e6}, "first_macs is above max_macs"),
        ({"first_ms": 5, "max_ms": 4}, "first_ms is above max_ms"),
        ({"max_macs": 1e6, "max_params": 1e6}, "a plan has one budget"),
        ({"max_macs": 0}, "max_macs is no number in range"),
        ({"max_ms": float("nan")}, "max_ms is no number in range"),
        ({"max_mb": float("inf")}, "max_mb is no number in range"),
        ({"max_params": "30M"}, "max_params is no number in range"),
        ({"leaves": (8, 4)}, "the largest number of leaves is no integer in range"),
        ({"leaves": 1}, "the least number of leaves is no integer in range"),
        ({"leaves": 10**6}, "the least number of leaves is no integer in range"),
        ({"leaves": "4..8"}, "leaves is no range"),
        ({"leaves": (4,)}, "leaves is no range"),
        ({"leaves": (5, 7)}, "no tree has 5 to 7 leaves"),
        ({"leaves": 6}, "no tree has 6 leaves"),
        ({"fanouts": (1,)}, "a fanout is no integer in range"),
        ({"fanouts": ()}, "there are no fanouts to choose from"),
        ({"fanouts": 2}, "fanouts cannot be gone through"),
        ({"pick": 0}, "pick is no integer in range"),
        ({"pick": 1000}, "pick is no integer in range"),
        ({"measure": 1}, "measure is of a wrong type"),
        ({"all_points": None}, "all_points is of a wrong type"),
    ],
)
def test_wrong_arguments_are_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        planned(**asked)


def test_the_nearest_numbers_of_leaves_are_named() -> None:
    with pytest.raises(InputError, match="the nearest possible: 4 or 8"):
        planned(leaves=(5, 7))
    with pytest.raises(InputError, match="the nearest possible: 9"):
        planned(leaves=(2, 8), fanouts=(9,))


def test_an_impossible_first_answer_names_the_nearest_possible() -> None:
    with pytest.raises(InputError, match=f"first_macs of at least {BASE:,} MACs") as raised:
        planned(first_macs=BASE - 1)
    assert f"Found {BASE - 1:,} MACs" in str(raised.value)
    assert planned(first_macs=BASE).base.macs == BASE


@pytest.mark.parametrize(
    ("option", "cost"),
    [
        ("max_macs", lambda tree: tree.nested[-1].macs),
        ("max_params", lambda tree: tree.nested[-1].parameters),
        ("max_mb", lambda tree: tree.bytes / 1e6),
    ],
)
def test_an_impossible_budget_names_the_nearest_possible(
    option: str, cost: Callable[[Any], float]
) -> None:
    with pytest.raises(InputError, match="the nearest possible: 4 leaves, splits ") as raised:
        planned(**{option: 1e-3}, leaves=4)
    splits = str(raised.value).partition("splits ")[2].splitlines()[0].split(",")
    hne = treeify.hierarchicalize(small.build(), splits, init="fresh", example_input=small.EXAMPLE)
    macs, parameters = hne.count_macs(), hne.count_parameters()
    tensors = [*hne.parameters(), *hne.buffers()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6
    nearest = {"max_macs": macs, "max_params": parameters, "max_mb": size}[option]
    # Possible it is, and nothing below it.
    found = planned(**{option: nearest}, leaves=4)
    assert {cost(tree) for tree in found.candidates} == {nearest}
    with pytest.raises(InputError, match="the nearest possible"):
        planned(**{option: 0.999 * nearest}, leaves=4)


def test_more_leaves_than_points_allow_are_refused() -> None:
    with pytest.raises(InputError, match="too few split points for 1024 leaves"):
        planned(leaves=1024)


def test_a_model_without_a_point_is_refused() -> None:
    from torch import nn

    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    with pytest.raises(SplitError, match="no split points with MACs on both sides"):
        plan(model, example_input=small.EXAMPLE)


def test_limits_know_whether_times_are_needed() -> None:
    assert limits((None, 5.0), (None,) * 4, 4, (2,)).timed
    assert limits((None, None), (None, 40.0, None, None), 4, (2,)).timed
    assert not limits((1e6, None), (1e9, None, None, None), 4, (2,)).timed


def test_without_a_budget_four_base_models_are_one() -> None:
    asked = limits((None, None), (None,) * 4, 4, (2,))
    assert asked.budget_for(100) == Budget("macs", 400, asked=False)


def test_numbers_of_leaves_are_products() -> None:
    assert numbers_of_leaves((2, 3), 12) == [1, 2, 3, 4, 6, 8, 9, 12]
    assert numbers_of_leaves((4,), 3) == [1]


def test_amounts_have_units() -> None:
    assert amount(1.2e9, "macs") == "1,200,000,000 MACs"
    assert amount(3e7, "params") == "30,000,000 parameters"
    assert amount(1.2345, "ms") == "1.23 ms"
    assert amount(120, "mb") == "120 MB"
    assert amount(12345.6, "mb") == "12,346 MB"
    assert amount(0.012341, "mb") == "0.0123 MB"
    assert amount(0.012341, "mb", up=True) == "0.0124 MB"
    assert amount(5e-324, "ms") == "4.94e-324 ms"
    assert amount(1000.2, "macs", up=True) == "1,001 MACs"
