"""Graphs run without values, where batch norms are answered for torch."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from treeify.running import Recorder

NORMS = {
    "1d": (nn.BatchNorm1d(4), torch.zeros(2, 4)),
    "2d": (nn.BatchNorm2d(4), torch.zeros(2, 4, 5, 5).to(memory_format=torch.channels_last)),
    "3d": (nn.BatchNorm3d(4, affine=False), torch.zeros(2, 4, 3, 2, 2)),
    "no statistics": (nn.BatchNorm2d(4, track_running_stats=False), torch.zeros(2, 4, 5, 5)),
    "half": (nn.BatchNorm2d(4), torch.zeros(2, 4, 5, 5, dtype=torch.bfloat16)),
}


class Watched(Recorder):
    """Keeps what its one module gives."""

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        self.given = super().call_module(target, args, kwargs)
        return self.given


def given(norm: nn.Module, x: Tensor) -> Tensor:
    model = nn.Sequential(norm)
    recorder = Watched(model, fx.symbolic_trace(model).graph)
    with torch.no_grad():
        recorder.record(x, count=False)
    return recorder.given


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", NORMS)
def test_batch_norms_give_what_torch_gives(case: str, training: bool) -> None:
    norm, x = (own.to("meta") for own in NORMS[case])
    with torch.no_grad():
        expected = norm.train(training)(x)
    found = given(norm, x)
    assert found.is_meta
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.stride() == expected.stride()


def test_values_are_computed_where_there_are_any() -> None:
    """Models that look at values run with them."""
    norm, x = nn.BatchNorm2d(3), torch.rand(2, 3, 4, 4)
    assert torch.equal(given(norm, x), norm(x))
