"""Convolutional networks whose layers can be fused, and ensembles of them."""

from collections.abc import Callable

import small
import torch
from fusing import Ensemble, settle
from torch import Tensor, nn

import treeify

WIDTH = 8


class Net(nn.Module):
    """A stem, two stages given as modules or built by hand, and a head; [N, 3, 8, 8] -> [N, 5]."""

    def __init__(self, stage1: nn.Module, stage2: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH))
        self.stage1 = stage1
        self.stage2 = nn.Conv2d(WIDTH, WIDTH, 1) if stage2 is None else stage2
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(self.stem(x)))
        return self.head(x.flatten(2).mean(2))


def convert(model: nn.Module, splits: list[str] | None = None) -> Ensemble:
    hne = treeify.hierarchicalize(
        model, splits or ["stage1", "stage2"], init="perturb", example_input=small.EXAMPLE
    ).eval()
    torch.manual_seed(3)
    settle(hne)
    return hne


def ensemble() -> Ensemble:
    hne = small.ensemble()
    torch.manual_seed(3)
    settle(hne)
    return hne


def conv(**kwargs: object) -> nn.Conv2d:
    return nn.Conv2d(WIDTH, WIDTH, 3, **{"padding": 1, **kwargs})  # type: ignore[arg-type]


class Residual(nn.Module):
    """Two convolutions and a way to join them with their input."""

    def __init__(self, join: Callable[["Residual", Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(), conv()
        self.norm = nn.BatchNorm2d(WIDTH)
        self.other_norm = nn.BatchNorm2d(WIDTH)
        self.dropout = nn.Dropout()
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self, x)
