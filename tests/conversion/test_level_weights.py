"""Which weights a level would have of its own."""

import small
import torch
from torch import Tensor, nn

from treeify.conversion.assemble import trace_model
from treeify.conversion.level_weights import LevelWeights
from treeify.conversion.levels import Dependencies


class Shared(nn.Module):
    """Reads one weight at both ends, another by itself, and a third in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.gain, self.noise = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        if self.training:
            x = x + self.noise[:, None, None]
        return (self.first(x) * self.gain.exp()[:, None, None]).mean((2, 3))


def _weights(model: nn.Module, *, trained_only: bool) -> LevelWeights:
    traced = trace_model(model, example_input=small.EXAMPLE)
    modes = {mode: Dependencies(graph) for mode, graph in traced.graphs.items()}
    return LevelWeights(traced, modes, trained_only=trained_only)


def test_a_weight_belongs_to_the_lowest_level_that_reads_it() -> None:
    weights = _weights(Shared(), trained_only=False)
    assert weights.behind("input") == 6
    assert weights.behind("second") == 4  # its own, the gain and the noise
    assert weights.behind("mean") == 0


def test_frozen_weights_count_where_all_are_frozen() -> None:
    model = Shared()
    model.second.requires_grad_(False)
    assert _weights(model, trained_only=True).behind("second") == 2
    assert _weights(model, trained_only=False).behind("second") == 4
    model.requires_grad_(False)
    assert _weights(model, trained_only=True).behind("second") == 4
