"""The figure every comparison is made of: how far outputs are from those expected."""

import math

import pytest
import torch
from torch import Tensor

from treeify.parity.tolerance import ATOL, RTOL, deviation, scale_of

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64]
)
def test_it_is_the_largest_error_over_its_tolerance(dtype: torch.dtype) -> None:
    expected = torch.tensor([0, 8, -64, 1], dtype=dtype)
    actual = torch.tensor([0, 8, -68, 2], dtype=dtype)
    largest = max(4 / (ATOL + RTOL * 64), 1 / (ATOL + RTOL * 1))
    assert deviation(actual, expected) == pytest.approx(largest, rel=1e-5)
    assert deviation(expected, expected.clone()) == 0


def test_every_element_of_a_large_tensor_counts() -> None:
    expected = torch.zeros(3000, 1000)
    for row in (0, 1500, 2999):
        actual = expected.clone()
        actual[row, -1] = 3 * ATOL
        assert deviation(actual, expected) == pytest.approx(3)


def test_small_values_have_a_smaller_tolerance() -> None:
    """By the largest of all tensors together: one that is 0 but for rounding is no scale."""
    expected = {"logits": torch.tensor([1e-3, -4e-3]), "rest": torch.tensor([1e-12]), "name": "x"}
    assert scale_of(expected) == pytest.approx(4e-3)
    actual = {**expected, "rest": torch.tensor([2e-8])}
    found = deviation(actual, expected, scale_of(expected))
    assert found == pytest.approx(2e-8 / (4e-3 * ATOL), rel=1e-3)
    assert deviation(actual, expected) == pytest.approx(2e-8 / ATOL, rel=1e-3)
    for large in (torch.tensor([0.5, 9.0]), torch.zeros(3), torch.zeros(0), torch.tensor([NAN])):
        assert scale_of(large) == 1
    assert scale_of((torch.tensor([0.25j]), torch.tensor([7]), None)) == 0.25


def test_shapes_and_dtypes_must_be_the_same() -> None:
    x = torch.ones(2, 3)
    assert deviation(x[:1], x) == INF
    assert deviation(x.double(), x) == INF
    assert deviation({"logits": x}, {"logits": x.clone()}) == 0


def test_complex_numbers_deviate_in_both_parts() -> None:
    expected = torch.tensor([1 + 2j, 3 - 1j])
    assert deviation(expected.clone(), expected) == 0
    assert deviation(expected + 0.5j, expected) == pytest.approx(0.5 / (ATOL + RTOL), rel=1e-5)
    assert deviation(expected.real, expected) > 1


@pytest.mark.parametrize(
    ("actual", "expected", "found"),
    [
        ([INF, NAN, 1.0], [INF, NAN, 1.0], 0.0),
        ([INF, NAN, 1.0], [INF, NAN, 1.0 + 1.1e-4], 1.0),
        ([-INF], [INF], INF),
        ([NAN], [1.0], INF),
        ([1.0], [NAN], INF),
        ([1.0], [INF], INF),
        ([INF], [1.0], INF),
    ],
)
def test_infinite_and_undefined_values_agree_only_with_themselves(
    actual: list[float], expected: list[float], found: float
) -> None:
    value = deviation(torch.tensor(actual).double(), torch.tensor(expected).double())
    assert value == pytest.approx(found, rel=1e-3) or (found == INF and value > 1e300)


def test_structures_are_compared_tensor_by_tensor_and_nothing_is_changed() -> None:
    expected = {"a": torch.ones(2, requires_grad=True), "b": (torch.zeros(0), "text")}
    actual = {"a": torch.ones(2) + 1.1e-4, "b": (torch.zeros(0), "text")}
    before = actual["a"].clone()  # type: ignore[union-attr]
    assert deviation(actual, expected) == pytest.approx(1.0, rel=1e-2)
    one = actual["a"]
    assert isinstance(one, Tensor) and torch.equal(one, before)
    assert deviation(torch.ones(2), torch.ones(3)) == INF
