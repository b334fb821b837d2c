"""Weights fit a model whatever stands before their keys."""

import small
import timm
import torch
import torchvision
from torch import nn

from treeify.models.load_weights import head_paths, load_into
from treeify.models.weights import Weights


def test_of_a_network_and_its_average_the_average_is_loaded() -> None:
    one, two = small.SmallNet().state_dict(), small.SmallNet().state_dict()
    both = {f"net.{key}": one[key] for key in one} | {f"net_ema.{key}": two[key] for key in two}
    model = small.SmallNet()
    notes = load_into(model, Weights(both, "file"))
    assert torch.equal(model.head.weight, two["head.weight"])
    assert notes[1] == "weights: keys without 'net_ema.'"
    assert "left out, as they are not under 'net_ema.': net.stem.0.weight" in notes[2]
    assert "and 10 more" in notes[2]


def test_a_tied_tensor_is_needed_once_and_tables_that_layers_compute_not_at_all() -> None:
    model = small.SmallNet()
    model.tied = model.head
    model.register_buffer("table", torch.ones(2), persistent=False)
    state = small.SmallNet().state_dict()
    load_into(model, Weights(state | {"table": torch.zeros(2)}, "file"))
    assert torch.equal(model.tied.weight, state["head.weight"])
    assert model.table.sum() == 2


def test_a_model_with_a_compiled_part_loads_what_it_was_trained_as() -> None:
    model = small.SmallNet()
    model.stage1 = nn.ModuleDict({"_orig_mod": model.stage1})  # named as torch.compile would
    state = small.SmallNet().state_dict()
    load_into(model, Weights(state, "file"))
    assert torch.equal(model.stage1["_orig_mod"][0].weight, state["stage1.0.weight"])


def test_where_the_classifier_is() -> None:
    with torch.device("meta"):
        assert head_paths(timm.create_model("resnet10t")) == ["fc"]
        distilled = timm.create_model("deit_tiny_distilled_patch16_224", depth=1)
        assert head_paths(distilled) == ["head", "head_dist"]
        assert head_paths(timm.create_model("resnet10t", num_classes=0))  # its last layer
        assert head_paths(torchvision.models.squeezenet1_1()) == ["classifier.1"]
    assert head_paths(nn.ReLU()) == []
