"""What a saved configuration may say."""

from pathlib import Path

import pytest
import torch

from treeify.conversion.config_values import check_dtype, check_leaves, check_values
from treeify.errors import CheckpointError

GOOD = {
    "identity": "a",
    "architecture": None,
    "fingerprint": "b",
    "splits": ["layer2:2"],
    "example": [3, 8, 8],
    "versions": {"torch": "2.6"},
    "another": "key, of a later version",
}


def test_values_are_checked_by_key() -> None:
    check_values(Path("c"), GOOD)
    with pytest.raises(CheckpointError, match=r"splits\.0: .*; example: "):
        check_values(Path("c"), {**GOOD, "splits": [1], "example": []})


def test_leaves_have_room_in_the_tensors() -> None:
    weights = {"a": torch.empty(5000, 0), "b": torch.tensor(1.0)}
    check_leaves(Path("c"), ["a:5000"], weights)
    check_leaves(Path("c"), ["a:4096"], {})
    with pytest.raises(CheckpointError, match="splits with 10000 leaves"):
        check_leaves(Path("c"), ["a:5000", "b:2"], weights)


def test_floats_stay_floats() -> None:
    check_dtype(Path("c"), "a", torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16))
    for dtype in (torch.int64, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(CheckpointError, match=r"'a' of torch\.float32"):
            check_dtype(Path("c"), "a", torch.zeros(1), torch.zeros(1).to(dtype))
