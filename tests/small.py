"""A base model that converts in milliseconds, for tests of everything but conversion."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import treeify

CLASSES = 5


class SmallNet(nn.Module):
    """Three stages with a residual connection; [N, 3, 8, 8] -> [N, 5]."""

    def __init__(self, classes: int = CLASSES, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.stage1 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Dropout(0.2), nn.ReLU())
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.stage1(x) + x
        x = self.stage2(x) + x
        return self.head(x.mean((2, 3)))


def build(classes: int = CLASSES, channels: int = 3) -> SmallNet:
    return SmallNet(classes, channels)


class DrawnNet(SmallNet):
    """Has random numbers that no state dict has: a buffer, and a tensor that is not even one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shifts", torch.rand(8, 1, 1), persistent=False)
        self.mixing = torch.randn(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(self.stem(x)) * self.shifts
        return self.head(x.mean((2, 3)) @ self.mixing)


EXAMPLE = torch.zeros(1, 3, 8, 8)


def ensemble(
    splits: int | list[str] | None = None, init: str = "perturb", seed: int = 0
) -> treeify.HierarchicalEnsemble:
    torch.manual_seed(seed)
    chosen = ["stage1", "stage2:3"] if splits is None else splits
    return treeify.hierarchicalize(
        SmallNet(), chosen, init=init, seed=seed, example_input=EXAMPLE
    ).eval()


def converted(
    model: nn.Module, splits: Sequence[str] = ("stem", "stage1")
) -> treeify.HierarchicalEnsemble:
    """An ensemble of a model that takes these images, every branch with weights of its own."""
    return treeify.hierarchicalize(model, splits, init="perturb", example_input=EXAMPLE)


def images(count: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
