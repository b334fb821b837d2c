"""Convert a network of your own, prove it, and cut a smaller one out of it.

python examples/own_module.py
"""

import tempfile

import torch
from torch import Tensor, nn

import treeify


class Net(nn.Module):
    """A small convolutional classifier, [N, 3, H, W] -> [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.late = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU())
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits."""
        return self.head(self.late(self.early(x)).mean((2, 3)))


def main() -> None:
    """Print the conversion, its proof, and what was saved and loaded."""
    x = torch.randn(4, 3, 32, 32)
    hne = treeify.hierarchicalize(
        Net(), splits=["late", "head:3"], init="fresh", example_input=x
    ).eval()
    print(hne.conversion)
    print(treeify.verify(hne, x))
    smaller = hne.sub_ensemble(3)
    print(f"3 of {hne.leaves} leaves: {tuple(smaller(x).shape)}")
    with tempfile.TemporaryDirectory() as directory:
        treeify.save(hne, directory)
        again = treeify.load(directory, model=Net())
    print(f"loaded again: {torch.equal(again(x), hne(x))}")


if __name__ == "__main__":
    main()
