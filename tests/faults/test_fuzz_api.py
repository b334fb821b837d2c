"""Anything for an argument of a public call: an answer where it is right, else a clear error."""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from api_calls import CLASSES, IMAGES, LEAVES, SHAPE, TREE, calls, check
from faults.fuzzing import MANY, fuzzed, limited
from hypothesis import strategies as st
from torch import Tensor, nn

from treeify.tree import Span, Tree

DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool),
]
SHAPES = [
    *((), (0,), (1,), (IMAGES,), (IMAGES, CLASSES), (LEAVES, CLASSES), SHAPE),
    *((IMAGES, 3, 8, 8), (1, 3, 8, 8), (1, 3, 16, 8), (0, 3, 8, 8), (IMAGES, 1, 8, 8), (3, 8, 8)),
    *((IMAGES, 3, 0, 8), (0, LEAVES, CLASSES), (IMAGES, LEAVES, 0), (1, 1, 1, 1, 1)),
]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES))
    value = draw(st.sampled_from([-1, 0, 1, CLASSES - 1, CLASSES, -100, 0.2, math.nan, math.inf]))
    tensor = torch.full(shape, float(value))
    tensor = (tensor if dtype.is_floating_point else tensor.nan_to_num(9).clamp(-100, 99)).to(dtype)
    kind = draw(st.sampled_from(["plain"] * 6 + ["meta", "sparse", "gradient"]))
    if kind == "meta":
        return tensor.to("meta")
    if kind == "sparse" and tensor.ndim:
        return tensor.to_sparse()
    if kind == "gradient" and dtype.is_floating_point:
        return tensor.requires_grad_()
    return tensor


INTEGERS = st.one_of(
    st.integers(-3, 9), st.sampled_from([10**6, 2**31, 2**63, 2**64, -(10**30), 10**5000])
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    INTEGERS,
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, 0.5, 1.0, 2.0, float("nan"), float("inf"), -1e-9]),
    st.text(max_size=8),
    st.sampled_from(["x", "2", "stage1", "nan", "auto", "cuda", "\0", "head.bias", "9" * 5000]),
    st.binary(max_size=4),
    st.just(1j),
)
ANYTHING: st.SearchStrategy[Any] = st.one_of(
    SCALARS,
    tensors(),
    st.lists(SCALARS, max_size=4),
    st.lists(st.integers(-1, 6), max_size=4),
    st.lists(st.integers(-1, 6), max_size=4).map(tuple),
    st.lists(tensors(), max_size=2),
    st.dictionaries(st.text(max_size=2), SCALARS, max_size=2),
    st.sets(st.integers(-1, 6), max_size=3),
    st.builds(Span, st.integers(-1, 7), st.integers(-1, 7)),
    st.sampled_from([Tree(), TREE, Tree((2, 2))]),
    st.builds(object),
    st.builds(nn.Identity),
    st.builds(small.SmallNet),
    st.sampled_from([print, int, Path("nowhere"), np.zeros(3), np.zeros((1, 3, 8, 8)), range(3)]),
)


@st.composite
def mistakes(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A public call, and values for one or two of its arguments."""
    name = draw(st.sampled_from(sorted(calls())))
    keys = st.sampled_from(sorted(calls()[name].right))
    return name, {key: draw(ANYTHING) for key in draw(st.sets(keys, min_size=1, max_size=2))}


def _fuzz(mistake: tuple[str, dict[str, Any]]) -> None:
    with limited(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(*mistake)


@fuzzed(400, mistake=mistakes())
def test_a_few_hundred_mistakes(mistake: tuple[str, dict[str, Any]]) -> None:
    _fuzz(mistake)


@fuzzed(MANY, mistake=mistakes())
def test_ten_thousand_mistakes(mistake: tuple[str, dict[str, Any]]) -> None:
    _fuzz(mistake)


@pytest.mark.parametrize("name", sorted(calls()))
def test_calls_are_right_as_they_stand(name: str) -> None:
    """Else no mistake would be one."""
    call = calls()[name]
    nothing = ("load", "push", "image_folder", "cifar10", "timm_dataset", "webdataset")
    if name in (*nothing, "save", "hne.fill"):  # there is nothing to read, or they write
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call.function(**call.arguments)
