"""The figure every proof is made of: how far outputs are from those expected."""

import gc
import math

import pytest
import small
import torch
import torch.nn.functional as F
from torch import Tensor

import treeify
from treeify.parity.deterministic import FullPrecision, deterministic
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


def test_in_full_precision_casts_to_float32_are_none() -> None:
    x, single = torch.rand(3, dtype=torch.float64), torch.rand(3)
    with FullPrecision():
        for made in (
            *(x.float(), x.to(torch.float32), x.to("cpu", dtype=torch.float32)),
            *(x.softmax(0, dtype=torch.float32), torch.sum(x, 0, dtype=torch.float32)),
        ):
            assert made.dtype == torch.float64
        assert torch.equal(x.float(), x)
        for made in (single.type_as(x), x.type_as(single), (x > 0).float() @ x, x @ single):
            assert made.dtype == torch.float64
        assert x.half().dtype == torch.float16
        assert single.double().dtype == torch.float64
        assert single.to(torch.float32).dtype == single.float().dtype == torch.float32
        lists = (
            torch.cat([x, single]),
            torch.stack(tensors=[single, x]),
            torch.einsum("i,i", x, single),
        )
        assert {made.dtype for made in lists} == {torch.float64}
    assert x.float().dtype == torch.float32


def test_draws_are_held_in_full_precision() -> None:
    x = torch.rand(3, dtype=torch.float64)
    with deterministic(torch.float64):
        drawn = torch.rand_like(x, dtype=torch.float32)
        assert drawn.dtype == torch.float64 and drawn.eq(0.5).all()
        assert torch.equal(F.dropout(x, 0.5, training=True), x)
        assert x.clone().bernoulli_(0.25).eq(0.25).all()
        own = torch.bernoulli(x).float()
        assert own.dtype == torch.float64 and torch.equal(own, x)
    with deterministic(torch.float32):
        assert torch.rand_like(x, dtype=torch.float32).dtype == torch.float32


def bytes_in_memory() -> int:
    """Of all tensors that Python can find, each storage once."""
    tensors = [one for one in gc.get_objects() if type(one) in (Tensor, torch.nn.Parameter)]
    storages = (one.untyped_storage() for one in tensors if not one.is_meta)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_a_check_leaves_no_copies_of_weights_behind() -> None:
    """Graphs refer to themselves: without a thought they keep weights, through the next check."""
    hne = small.ensemble()
    x = small.images()
    gc.collect()
    before = bytes_in_memory()
    gc.disable()
    try:
        treeify.verify(hne, x)
        assert bytes_in_memory() == before > 0
    finally:
        gc.enable()
