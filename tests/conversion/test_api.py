"""Trained models packed into an ensemble."""

import pytest
import small
import torch
from torch.testing import assert_close

import treeify


def test_packing_trained_models() -> None:
    torch.manual_seed(0)
    models = [small.SmallNet().eval() for _ in range(4)]
    x = small.images()
    separate = treeify.pack(models, splits=["input"], example_input=small.EXAMPLE).eval()
    assert_close(separate(x), torch.stack([model(x) for model in models], dim=1))

    shared = treeify.pack(models, splits=["stage1", "stage2"], example_input=small.EXAMPLE)
    leaf = shared.leaf(3)
    assert torch.equal(leaf.head.weight, models[3].head.weight)
    assert torch.equal(leaf.stage1[0].weight, models[2].stage1[0].weight)
    assert torch.equal(leaf.stem[0].weight, models[0].stem[0].weight)


def test_models_that_cannot_be_packed() -> None:
    with pytest.raises(treeify.TreeifyError, match="model 1 is not built like model 0"):
        treeify.pack([small.SmallNet(), small.SmallNet(7)], splits=["stage1"])
    with pytest.raises(treeify.TreeifyError, match="3 models cannot be the leaves"):
        treeify.pack(
            [small.SmallNet() for _ in range(3)],
            splits=["stage1", "stage2"],
            example_input=small.EXAMPLE,
        )


def test_models_with_plain_tensors_of_their_own_cannot_be_packed() -> None:
    models = [small.DrawnNet() for _ in range(2)]
    with pytest.raises(treeify.TreeifyError, match=r"'mixing' of model 1 differs.*(?s:.*)buffer"):
        treeify.pack(models, splits=["stage1"], example_input=small.EXAMPLE)
    models[1].mixing = models[0].mixing.clone()
    hne = treeify.pack(models, splits=["stage1"], example_input=small.EXAMPLE).eval()
    assert torch.equal(hne.leaf(1).shifts, models[1].shifts)
