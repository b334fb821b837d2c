"""Models whose values cross splits in unusual forms."""

import small
import torch
from torch import Tensor, nn

import treeify


def convert(model: nn.Module, splits: list[str] | None = None) -> treeify.HierarchicalEnsemble:
    """An ensemble in evaluation mode, of branches that differ."""
    torch.manual_seed(0)
    return treeify.hierarchicalize(
        model, splits or ["stage1", "stage2"], init="perturb", example_input=small.EXAMPLE
    ).eval()


class Views(small.SmallNet):
    """What crosses splits are views of larger tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1, self.stage2 = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(self.stem(x).chunk(2, 1)[0])
        x = self.stage2(x.chunk(2, 1)[1])
        return self.head(x.mean((2, 3)))


class PerBranch(small.SmallNet):
    """What crosses splits runs per branch, since no rule knows how it packs."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(self.stem(x))
        spectrum = torch.fft.fft(x).real
        x = self.stage2(x) + spectrum
        return self.head(x.mean((2, 3)) + spectrum[:, :, 0, 0])


class Pair(small.SmallNet):
    """A tuple crosses, and one value jumps a level."""

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        left, right = self.stage1(stem).chunk(2, 1)
        x = self.stage2(torch.cat((right, left), 1)) + stem
        return self.head(x.mean((2, 3)))


class Gates(small.SmallNet):
    """Numbers per image, [N], cross levels."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        first = x.mean((1, 2, 3))
        x = self.stage1(x) * first[:, None, None, None]
        second = x.mean((2, 3))[:, 0].sigmoid() + first
        x = self.stage2(x) + x
        return self.head(x.mean((2, 3)) * second[:, None])
