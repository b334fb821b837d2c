"""The paper's base networks, counted."""

import warnings

import pytest
import torch
from torch import nn

import treeify
from treeify.errors import ModelError
from treeify.evaluation.cost import count_macs, fvcore_macs
from treeify.models import CifarResNet, MobileNetV2, cifar_resnet50, mobilenetv2_hne
from treeify.models.architecture import Architecture
from treeify.tree import Tree

BLOCKS = ("block1", "block2", "block3", "block4")
# Channels, layers and resolution of each block.
TABLE_3 = ((32, 2, 56), (48, 3, 28), (88, 4, 14), (136, 3, 14), (224, 3, 7))
TABLE_3_SPLITS = ["block2", "block3", "block4", "block5"]


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
    ("network", "options", "match"),
    [
        (CifarResNet, {"width": 0.3}, "multiple of 4"),
        (CifarResNet, {"layers": [3, 4, 4]}, "layers"),
        (CifarResNet, {"layers": [3, 4, 0, 5]}, "layers"),
        (CifarResNet, {"strides": [1, 2, 2, 1, 1]}, "strides"),
        (MobileNetV2, {"width": 0.3}, "multiple of 0.125"),
        (MobileNetV2, {"width": 0}, "gives 0 channels"),
        (MobileNetV2, {"layers": []}, "layers"),
        (MobileNetV2, {"layers": [2, 3, 4, 3, 0]}, "layers"),
        (MobileNetV2, {"strides": [2, 2, 2, 1]}, "strides"),
        (MobileNetV2, {"strides": [2, 2, 2, 1, 4]}, "strides of 1 or 2"),
    ],
)
def test_impossible_networks_are_refused(
    network: type[nn.Module], options: dict, match: str
) -> None:
    with pytest.raises(ModelError, match=match):
        network(**options)


def table_3_by_hand() -> tuple[list[int], list[int]]:
    """MACs and parameters of each level: a convolution's weights run, with its norm, per pixel."""
    levels: list[list[tuple[int, int]]] = [[] for _ in TABLE_3]
    levels[0] += [(3 * 24 * 9 + 2 * 24, 112), (24 * 9 + 2 * 24, 112)]
    inputs, before = 24, 112
    for level, (channels, layers, side) in zip(levels, TABLE_3, strict=True):
        for _ in range(layers):
            wide = 6 * inputs
            level.append((inputs * wide + 2 * wide, before))
            level.append((9 * wide + 2 * wide, side))
            level.append((wide * channels + 2 * channels, side))
            inputs, before = channels, side
    levels[-1] += [(224 * 1344 + 2 * 1344, 7), (1344 * 1792 + 1792 * 1000, 1)]
    macs_by_level = [sum(count * side**2 for count, side in level) for level in levels]
    parameters = [sum(count for count, _ in level) for level in levels]
    parameters[-1] += 1792 + 1000  # biases of the linear layers, which fvcore does not count
    return macs_by_level, parameters


def test_a_tree_of_the_imagenet_network_costs_what_table_3_adds_up_to() -> None:
    """MACs as `evaluation.cost` says: products, and two per element of a batch norm."""
    with torch.device("meta"):
        base = mobilenetv2_hne()
    hne = treeify.hierarchicalize(base, TABLE_3_SPLITS, init="copy")
    sizes = hne.tree.nested_sizes
    assert sizes == (1, 2, 4, 8, 16)
    counted = [
        [hne.count_macs(leaves) for leaves in sizes],
        [hne.count_parameters(leaves) for leaves in sizes],
    ]
    for found, per_branch in zip(counted, table_3_by_hand(), strict=True):
        assert found == [
            sum(
                times * own for times, own in zip(hne.tree.branch_count(n), per_branch, strict=True)
            )
            for n in sizes
        ]
    in_millions = [[round(count / 1e6, 1) for count in counts] for counts in counted]
    assert in_millions == [[506.9, 618.2, 956.7, 1709.5, 3293.7], [7.1, 13.1, 25.8, 51.6, 103.1]]
    assert hne.conversion.packed_fraction == 1


def test_the_imagenet_base_model_costs_what_its_table_says() -> None:
    model = mobilenetv2_hne()
    macs_by_level, parameters = table_3_by_hand()
    assert fvcore_macs(model, torch.zeros(1, 3, 224, 224)) == sum(macs_by_level) == 506_870_672
    assert sum(own.numel() for own in model.parameters()) == sum(parameters) == 7_092_664
    assert count_macs(model.to("meta"), (3, 224, 224)) == sum(macs_by_level)


def test_block_resolutions_and_channels_are_table_3() -> None:
    with torch.device("meta"):
        model = mobilenetv2_hne()
        images = torch.zeros(2, 3, 224, 224)
    shapes = []
    blocks = (getattr(model, f"block{number}") for number in range(1, 6))
    for part in (*model.stem, *blocks, model.conv, *model.head):
        part.register_forward_hook(lambda *call: shapes.append(tuple(call[-1].shape[1:])))
    assert model(images).shape == (2, 1000)
    assert shapes == [
        (24, 112, 112),
        (24, 112, 112),
        *((channels, side, side) for channels, _, side in TABLE_3),
        (1344, 7, 7),
        (1792,),
        (1792,),
        (1000,),
    ]
    assert [len(model.get_submodule(f"block{number}")) for number in range(1, 6)] == [
        layers for _, layers, _ in TABLE_3
    ]


def test_leaves_of_the_imagenet_network_equal_their_own_networks() -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 3, 64, 64)
    base = mobilenetv2_hne(10, 0.25, [2, 1, 1, 1, 1])
    for module in base.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # without statistics of its own, new logits are near 0
    base(images)
    hne = treeify.hierarchicalize(
        base.eval(), TABLE_3_SPLITS, init="perturb", example_input=images[:1]
    )
    assert treeify.verify(hne, images).worst <= 1
    assert hne(images).std(1).mean() > 1e-3


def test_a_tree_without_splits_is_the_imagenet_network() -> None:
    torch.manual_seed(0)
    base = mobilenetv2_hne(10, 0.25, [1, 1, 1, 1, 1])
    images = torch.rand(2, 3, 64, 64)
    hne = treeify.hierarchicalize(base, [], init="copy", example_input=images)
    torch.testing.assert_close(hne(images)[:, 0], base(images))


def test_the_imagenet_network_is_built_by_name_and_initialised_as_torchvisions() -> None:
    torch.manual_seed(0)
    model = Architecture("treeify.models:mobilenetv2_hne", {"num_classes": 100}).build()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            expected = (2 / (module.out_channels * module.kernel_size[0] ** 2)) ** 0.5
        elif isinstance(module, nn.Linear):
            expected = 0.01
            assert not module.bias.any()
        else:
            continue
        assert module.weight.std().item() == pytest.approx(expected, rel=0.2)
