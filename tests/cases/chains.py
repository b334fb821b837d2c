"""A small chain of layers to convert, and what its ensembles have to answer."""

import torch
from torch import Tensor, nn

import treeify

X = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def chain(*layers: nn.Module) -> nn.Sequential:
    """A convolution, a second one to split before, and layers before the pooled head."""
    torch.manual_seed(0)
    first = (nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    return nn.Sequential(*first, *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def assert_copies(model: nn.Module, split: str = "1", x: Tensor = X) -> None:
    """Every leaf of a copy answers as the model does."""
    hne = treeify.hierarchicalize(model, [split], init="copy", example_input=x).eval()
    expected = model.eval()(x)
    torch.testing.assert_close(hne(x), torch.stack([expected, expected], 1), rtol=1e-4, atol=1e-5)


def assert_leaves(
    model: nn.Module, split: str = "1", x: Tensor = X
) -> treeify.HierarchicalEnsemble:
    """Every leaf with weights of its own answers as its own network does, in both modes."""
    hne = treeify.hierarchicalize(model, [split], init="perturb", example_input=X)
    for training in (False, True):
        leaves = [hne.leaf(index).train(training) for index in range(hne.leaves)]
        expected = torch.stack([leaf(x) for leaf in leaves], 1)
        torch.testing.assert_close(hne.train(training)(x), expected, rtol=1e-4, atol=1e-5)
    return hne
