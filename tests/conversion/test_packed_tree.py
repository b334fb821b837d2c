"""An ensemble's tensors are its leaves' tensors, and a leaf is a network of its own."""

import pytest
import small
import torch

import treeify
from treeify.errors import LeafError


@pytest.mark.parametrize("leaf", [-1, 6, 1.0, True, "0"])
def test_a_leaf_that_does_not_exist(leaf: object) -> None:
    with pytest.raises(LeafError, match="from 0 to 5"):
        small.ensemble().leaf(leaf)  # type: ignore[arg-type]


def test_a_leaf_is_the_plain_architecture_with_its_own_copy() -> None:
    hne = small.ensemble()
    leaf = hne.leaf(4)
    assert type(leaf) is small.SmallNet
    before = hne(small.images())
    with torch.no_grad():
        for parameter in leaf.parameters():
            parameter.zero_()
    assert torch.equal(hne(small.images()), before)
    assert not hne.leaf(4).training
    assert small.SmallNet().load_state_dict(leaf.state_dict()).missing_keys == []


def test_a_leaf_has_the_modes_of_the_modules() -> None:
    hne = small.ensemble().train()
    hne.get_submodule("stage1").eval()
    leaf = hne.leaf(1)
    assert leaf.training
    assert leaf.stage2.training
    assert not any(module.training for module in leaf.stage1.modules())


def test_tied_parameters_stay_tied() -> None:
    class Tied(small.SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.stage2[0].weight = self.stage1[0].weight

    for splits in (["stage1"], ["stage1", "stage2"], ["head"]):
        model = Tied()
        hne = treeify.hierarchicalize(model, splits, init="perturb", example_input=small.EXAMPLE)
        leaf = hne.leaf(1)
        assert leaf.stage1[0].weight is leaf.stage2[0].weight
        assert hne.get_parameter("stage1.0.weight") is hne.get_parameter("stage2.0.weight")
        assert treeify.verify(hne, small.images()).worst <= 1


def test_frozen_parameters_stay_frozen() -> None:
    model = small.SmallNet()
    model.stem.requires_grad_(False)
    hne = treeify.hierarchicalize(model, ["stage1"], init="fresh", example_input=small.EXAMPLE)
    frozen = {name for name, parameter in hne.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith("stem")}
    assert not hne.leaf(0).stem[0].weight.requires_grad
