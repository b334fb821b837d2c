"""A dtype is tried once, and refused only where it alone is to blame."""

import pytest
import torch
from torch import Tensor

from treeify.conversion.input_check import InputCheck
from treeify.errors import InputError


def test_a_dtype_that_can_be_computed_with_is_tried_once() -> None:
    check, calls = InputCheck((3, 8, 8), one_size=False), list[torch.dtype]()

    def run(x: Tensor) -> None:
        calls.append(x.dtype)

    for _ in range(2):
        check.check_dtype(torch.zeros(1, 3, 8, 8), torch.float32, run)
        check.check_dtype(torch.zeros(1, 3, 8, 8).double(), torch.float32, run)
    assert calls == [torch.double]
    check.check_dtype(torch.zeros(1, 3, 8, 8).double(), torch.half, run)
    assert len(calls) == 2


def test_what_fails_in_either_dtype_is_left_to_fail() -> None:
    check = InputCheck((3, 8, 8), one_size=False)
    check.check_dtype(torch.zeros(1, 3, 2, 2).double(), torch.float32, lambda x: ValueError("size"))
    with pytest.raises(InputError, match=r"(?s)Found torch\.float64.*x\.to\(torch\.float32\)"):
        check.check_dtype(
            torch.zeros(1, 3, 8, 8).double(),
            torch.float32,
            lambda x: RuntimeError("Double") if x.dtype == torch.double else None,
        )


@pytest.mark.parametrize(("one_size", "fits"), [(True, False), (False, True)])
def test_other_sizes_fit_where_the_model_takes_them(one_size: bool, fits: bool) -> None:
    check = InputCheck((3, 8, 8), one_size=one_size)
    check.check_shape(torch.zeros(2, 3, 8, 8))
    if fits:
        check.check_shape(torch.zeros(2, 3, 9, 7))
    else:
        with pytest.raises(InputError, match=r"images of shape \[N, 3, 8, 8\]\n"):
            check.check_shape(torch.zeros(2, 3, 9, 7))
    for x in (torch.zeros(2, 1, 8, 8), torch.zeros(3, 8, 8), [[1.0]]):
        with pytest.raises(InputError, match="does not fit the model"):
            check.check_shape(x)
