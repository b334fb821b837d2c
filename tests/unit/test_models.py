"""The paper's base network, counted."""

import warnings

import pytest
import torch
from torch import nn

from treeify.errors import ModelError
from treeify.models import CifarResNet, cifar_resnet50
from treeify.tree import Tree

BLOCKS = ("block1", "block2", "block3", "block4")


def level_macs(model: nn.Module, size: int, *operations: str) -> list[float]:
    """What fvcore counts for the parts of the base network between the paper's splits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fvcore scripts a function as it is imported
        from fvcore.nn import FlopCountAnalysis

        counts = FlopCountAnalysis(model.eval(), torch.zeros(1, 3, size, size))
        counts.unsupported_ops_warnings(False)
        by_module = counts.by_module_and_operator()
    parts = ("stem", *BLOCKS, "head")
    *levels, head = (sum(by_module[part][name] for name in operations) for part in parts)
    return [*levels[:-1], levels[-1] + head]


@pytest.mark.parametrize(
    ("width", "batch_norm", "millions"),
    [
        (1.0, True, [53, 68, 110, 207, 412]),
        (0.5, True, [14, 18, 29, 54, 107]),
        (1.0, False, [51, 66, 107, 202, 402]),
        (0.5, False, [13, 17, 27, 51, 102]),
    ],
)
def test_a_tree_of_it_has_the_papers_macs(
    width: float, batch_norm: bool, millions: list[int]
) -> None:
    """The paper's figures come out if batch norm counts as fvcore counts it, two per element."""
    tree = Tree((2, 2, 2, 2))
    operations = ("conv", "linear", "batch_norm")[: 3 if batch_norm else 2]
    per_branch = level_macs(cifar_resnet50(100, width), 32, *operations)
    total = [
        sum(count * macs for count, macs in zip(tree.branch_count(n), per_branch, strict=True))
        for n in tree.nested_sizes
    ]
    assert [round(macs / 1e6) for macs in total] == millions


def test_it_is_fifty_layers_deep() -> None:
    model = cifar_resnet50()
    on_the_path = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "shortcut" not in name
    ]
    assert len(on_the_path) - 1 == 50  # the 1x1 convolution of the stem is not counted


def test_block_resolutions_and_channels_are_table_2() -> None:
    model = cifar_resnet50().eval()
    shapes = []
    for name in BLOCKS:
        getattr(model, name).register_forward_hook(lambda *call: shapes.append(call[-1].shape[1:]))
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 100)
    assert [tuple(shape) for shape in shapes] == [
        (64, 32, 32),
        (128, 16, 16),
        (256, 8, 8),
        (256, 8, 8),
    ]


def test_every_block_starts_with_a_shortcut_convolution() -> None:
    model = cifar_resnet50()
    for name in BLOCKS:
        first, *rest = getattr(model, name)
        assert isinstance(first.shortcut, nn.Sequential)
        assert all(isinstance(layer.shortcut, nn.Identity) for layer in rest)


def test_small_images_and_few_layers_work() -> None:
    model = cifar_resnet50(10, 0.25, [1, 1, 1, 1], [1, 2, 2, 1])
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"width": 0.3}, "multiple of 4"),
        ({"layers": [3, 4, 4]}, "layers"),
        ({"layers": [3, 4, 0, 5]}, "layers"),
        ({"strides": [1, 2, 2, 1, 1]}, "strides"),
    ],
)
def test_impossible_networks_are_refused(options: dict, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        CifarResNet(**options)
