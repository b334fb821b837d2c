"""Where a model splits: chosen, named, refused."""

from itertools import pairwise
from typing import Any

import pytest
import small
import timm
import torch
import torchvision
from torch import nn

import treeify
from treeify.conversion.assemble import trace_model
from treeify.conversion.splits import choose, inner_point, listed, split_points
from treeify.errors import SplitError
from treeify.tracing.trace import Traced


@pytest.fixture(scope="module")
def resnet() -> Traced:
    return trace_model(torchvision.models.resnet18(), example_input=torch.zeros(1, 3, 64, 64))


@pytest.fixture(scope="module")
def hrnet() -> Traced:
    model = timm.create_model("hrnet_w18_small", num_classes=10)
    return trace_model(model, example_input=torch.zeros(1, 3, 64, 64))


def _shares(traced: Traced, count: int) -> list[float]:
    points = choose(traced, count).points
    total = points[0].macs_before + points[0].macs_after
    cuts = [0, *(point.macs_before for point in points), total]
    return [(after - before) / total for before, after in pairwise(cuts)]


def test_chosen_splits_are_clean_even_and_the_same_every_time(resnet: Traced) -> None:
    chosen = choose(resnet, 4)
    assert chosen.names == ("layer1.1", "layer2", "layer3", "layer4")
    assert choose(resnet, "4") == chosen
    assert choose(resnet, chosen.specs) == chosen
    assert all(point.live == 1 for point in chosen.points)
    assert max(_shares(resnet, 4)) < 0.3


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_levels_are_about_even(resnet: Traced, count: int) -> None:
    assert max(_shares(resnet, count)) < 1.5 / (count + 1)


def test_points_where_one_tensor_is_live_come_first(hrnet: Traced) -> None:
    single = [point for point in split_points(hrnet) if point.live == 1]
    assert all(point.live == 1 for point in choose(hrnet, 2).points)
    many = choose(hrnet, len(single) + 2).points
    assert max(point.live for point in many) > 1


def test_the_inner_point_is_inside_a_module_and_parts_the_macs(resnet: Traced) -> None:
    point = inner_point(resnet)
    assert point is not None
    assert point.depth >= 2  # deeper than a block of a stage
    others = [own for own in split_points(resnet) if own.depth >= 2 and own.macs_before]
    assert abs(point.macs_before - point.macs_after) == min(
        abs(own.macs_before - own.macs_after) for own in others
    )
    hne = treeify.hierarchicalize(torchvision.models.resnet18(), [point.name], init="fresh")
    assert hne.leaves == 2


def test_the_inner_point_begins_no_stage() -> None:
    """The second of these two parts the MACs evenly, as no point inside of either does."""
    stages = [nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))) for _ in range(2)]
    model = nn.Sequential(nn.Sequential(*stages), nn.Flatten(), nn.Linear(4 * 64, 2))
    point = inner_point(trace_model(model, example_input=torch.zeros(1, 4, 8, 8)))
    assert point is not None
    assert point.name in ("0.0.2", "0.1.1")


@pytest.mark.parametrize(
    ("text", "found"),
    [("4", 4), (" 2 ", 2), ("a, b:3", ["a", " b:3"]), ("", []), (["a"], ["a"]), (0, 0)],
)
def test_splits_are_a_number_or_a_list(text: Any, found: object) -> None:
    assert listed(text) == found


@pytest.mark.parametrize("text", ["-1", -1, True, "layer3:two", "layer3:1", "layer2,layer3:0"])
def test_wrong_splits_need_no_model_to_be_refused(text: Any) -> None:
    with pytest.raises(SplitError):
        listed(text)


def test_a_split_inside_a_block_shares_what_does_not_depend_on_it(resnet: Traced) -> None:
    hne = treeify.hierarchicalize(
        torchvision.models.resnet18(),
        ["layer2.0.conv2"],
        init="fresh",
        example_input=torch.zeros(1, 3, 64, 64),
    )
    level = {node.path: node.level for node in hne.conversion.nodes}
    assert level["layer2.0.conv1"] == level["layer2.0.downsample.0"] == 0
    assert level["layer2.0.conv2"] == level["layer2.0.add"] == level["layer3.0.conv1"] == 1


@pytest.mark.parametrize(
    ("splits", "leaves", "branches"),
    [
        (["layer3:16"], 16, (1, 16)),
        ("layer2,layer3", 4, (1, 2, 4)),
        (["input:3", "layer4"], 6, (1, 3, 6)),
        (0, 1, (1,)),
    ],
)
def test_named_splits(
    resnet: Traced, splits: object, leaves: int, branches: tuple[int, ...]
) -> None:
    tree = choose(resnet, splits).tree  # type: ignore[arg-type]
    assert (tree.leaves, tree.branches) == (leaves, branches)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (["layer5"], r"names no module of ResNet.\n.*did you mean 'layer4'"),
        (["layer3", "layer2"], "'layer2' does not come after split 'layer3'"),
        (["layer2", "layer2"], "'layer2' repeats split 'layer2'"),
        (["layer2", "layer2.0"], "'layer2.0' is the same point as split 'layer2'"),
        (["layer2:1"], "at least two children"),
        (["layer2:many"], "a fanout that is not a number"),
        (-1, "not a number of splits"),
        (1000, "no 1000 split points"),
        (None, "splits=None is neither a number nor a list of names"),
        (b"", "neither a number nor a list of names"),
        ([4], r"splits=\[4\] is neither"),
        (2.0, "is neither"),
    ],
)
def test_splits_that_cannot_be(resnet: Traced, splits: object, message: str) -> None:
    with pytest.raises(SplitError, match=message):
        choose(resnet, splits)  # type: ignore[arg-type]


class Deciding(nn.Module):
    """What it does depends on values, so that it stays closed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("outer", "name", "message"),
    [
        (Deciding(), "0.inner.0", r"'0.inner.0' is inside of '0', which runs as one call: "),
        (
            nn.MultiheadAttention(4, 2, batch_first=True),
            "0.out_proj",
            r"is inside of '0', which runs as one call\.",
        ),
        (Deciding(), "0.iner", "names no module of"),
    ],
)
def test_inside_of_a_closed_module_there_is_no_split(
    outer: nn.Module, name: str, message: str
) -> None:
    class Attending(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = x.flatten(2)
            found = self[0](tokens, tokens, tokens)[0] if name == "0.out_proj" else self[0](x)
            return self[1](found.flatten(1))  # type: ignore[no-any-return]

    traced = trace_model(Attending(outer, nn.Linear(12, 2)), example_input=torch.zeros(1, 3, 2, 2))
    with pytest.raises(SplitError, match=message):
        choose(traced, [name])


def test_a_fanout_below_two(resnet: Traced) -> None:
    with pytest.raises(SplitError, match="fanout 1"):
        choose(resnet, 2, fanout=1)


def test_every_listed_point_can_be_split_at() -> None:
    traced = trace_model(small.SmallNet(), example_input=small.EXAMPLE)
    points = split_points(traced)
    assert [point.name for point in points[:3]] == ["stem", "stem.1", "stem.2"] or points
    for point in points:
        hne = treeify.hierarchicalize(
            small.SmallNet(), [point.name], init="perturb", example_input=small.EXAMPLE
        )
        assert treeify.verify(hne, small.images()).worst <= 1
