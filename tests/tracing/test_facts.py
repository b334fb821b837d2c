"""What is found out about each node."""

import small
import torch
from torch import Tensor, nn

import treeify
from treeify.conversion.api import open_up
from treeify.tracing.facts import facts


def test_facts_of_a_traced_model() -> None:
    traced = open_up(small.SmallNet(), example_input=small.EXAMPLE)
    known = {facts(node).path: facts(node) for node in traced.graphs[False].nodes}
    assert known["stage1.0"].macs == 64 * 9 * 8 * 8
    assert known["stage1.0"].tensors[0].shape == (2, 8, 8, 8)
    assert known["stage1.0"].tensors[0].batched
    assert "add" in known
    assert "add_1" in known


class Shared(nn.Module):
    """Computes with the number of images: `[N, 3, 8, 8] -> [N, 5]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 4, stride=4), nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x).flatten(2).transpose(1, 2))
        return self.head((x / x.shape[0] + 0.1 * x.size(0)).mean(1))


def test_the_number_of_images_is_that_of_one_network() -> None:
    torch.manual_seed(0)
    hne = treeify.hierarchicalize(Shared(), ["norm"], init="perturb", example_input=small.EXAMPLE)
    assert treeify.verify(hne, small.images(3)).worst <= 1
