"""Wrong arguments are named; right ones pass as they are."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from treeify import arguments
from treeify.errors import CheckpointError, InputError, LeafError, described


@pytest.mark.parametrize("value", [1, 5, np.int64(3)])
def test_integers_of_a_range_pass(value: object) -> None:
    arguments.require_integer("count", value, 1, 5)


@pytest.mark.parametrize("value", [0, 6, True, 2.0, "2", None, pytest.param(10**5000, id="huge")])
def test_other_integers_are_named(value: object) -> None:
    with pytest.raises(LeafError, match=r"count is no integer.*\n.*at least 1 and at most 5"):
        arguments.require_integer("count", value, 1, 5, error=LeafError)


@pytest.mark.parametrize("value", [0, 0.5, np.float32(0.5), Fraction(1, 2), math.inf])
def test_numbers(value: object) -> None:
    assert arguments.is_number(value)


@pytest.mark.parametrize("value", [math.nan, True, "1", None, 1j, 10**30, torch.ones(()), [1]])
def test_what_is_no_number(value: object) -> None:
    assert not arguments.is_number(value)


def test_infinity_is_a_number_where_it_may_be() -> None:
    arguments.require_number("seconds", math.inf, 0, finite=False, expected="seconds")
    with pytest.raises(InputError, match="Found inf"):
        arguments.require_number("seconds", math.inf, 0, expected="seconds")


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    assert arguments.as_path("path", str(tmp_path / "new"), CheckpointError) == tmp_path / "new"
    (tmp_path / "circle").symlink_to("circle")
    for path in ("", "a\0b", b"bytes", 5, "9" * 5000):
        with pytest.raises(CheckpointError, match="path"):
            arguments.as_path("path", path, CheckpointError)


def test_what_cannot_be_gone_through() -> None:
    arguments.require_iterable("sizes", (size for size in (1, 2)), "sizes")
    for value in (5, "12", torch.ones(())):
        with pytest.raises(InputError, match="sizes cannot be gone through"):
            arguments.require_iterable("sizes", value, "sizes")


def test_tensors_are_read_where_that_waits_for_nothing() -> None:
    tensor = torch.zeros(2)
    assert arguments.is_readable(tensor)
    assert not arguments.is_readable(tensor.to("meta"))
    assert not arguments.is_readable(torch.nn.Parameter(tensor))
    with FlopCounterMode(display=False):
        assert not arguments.is_readable(tensor)
    seen = []
    torch.func.vmap(lambda row: seen.append(arguments.is_readable(row)) or row)(tensor)
    assert seen == [False]


def test_arguments_are_described_in_short() -> None:
    assert described("x" * 1000) == f"'{'x' * 76}..."
    assert described(10**5000) == "an integer of 16,610 bits"
    assert described(torch.zeros(2, 3)) == "a Tensor of shape (2, 3), torch.float32"
    assert described([1, None]) == "[1, None]"
    assert described(list(range(100))).endswith("... (100 in all)]")
    assert described((torch.zeros(1),)) == "a tuple"
