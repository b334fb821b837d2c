"""Which of a checkpoint's state dicts is read."""

from pathlib import Path
from typing import Any

import pytest
import torch

from treeify.errors import CheckpointError
from treeify.models.weights import read_weights

ONE, TWO = ({"layer.weight": torch.full((2,), number)} for number in (1.0, 2.0))


@pytest.mark.parametrize(
    ("content", "source"),
    [
        (TWO, ""),
        (TWO | {"layer._extra_state": {"version": 1}}, ""),
        ({"state_dict": TWO, "epoch": 3, "scheduler": {"last_epoch": 3}}, ", 'state_dict'"),
        ({"state_dict_ema": None, "state_dict": TWO}, ", 'state_dict'"),
        ({"state_dict": ONE, "state_dict_ema": TWO}, ", 'state_dict_ema' and not 'state_dict'"),
        ({"model": TWO, "criterion": ONE}, ", 'model' and not 'criterion'"),
        ({"network": TWO, "best": torch.tensor(0.9)}, ", 'network'"),
    ],
)
def test_the_averaged_state_is_preferred_and_the_choice_is_said(
    tmp_path: Path, content: Any, source: str
) -> None:
    torch.save(content, tmp_path / "w")
    weights = read_weights(tmp_path / "w")
    assert list(weights.state) == ["layer.weight"]
    assert weights.state["layer.weight"][0] == 2
    assert weights.source == f"{tmp_path / 'w'}{source}"


@pytest.mark.parametrize("content", [{}, [], torch.ones(2), {"epoch": 3}, {3: torch.ones(2)}])
def test_what_holds_no_tensors_by_name_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_weights(tmp_path / "w")
