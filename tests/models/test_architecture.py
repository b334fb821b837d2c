"""Names and arguments build models, are JSON, and disturb no random state."""

from dataclasses import asdict
from urllib.error import URLError

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from treeify.errors import ModelError
from treeify.models.architecture import Architecture


@given(st.integers(0, 2**31), st.sampled_from(["resnet10t", "torchvision/squeezenet1_1"]))
def test_building_uses_the_random_state_as_it_stands(seed: int, name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = Architecture(name).build()
        torch.manual_seed(seed)
        second = Architecture(name).build()
    tensors = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in tensors)


@pytest.mark.parametrize("name", ["resnet18", "torchvision/resnet18", "odd_models:Grouped"])
def test_arguments_the_builder_refuses_are_named(name: str) -> None:
    with pytest.raises(ModelError, match=r"could not be built(.|\n)*unexpected keyword.*depht"):
        Architecture(name, {"depht": 3}).build()


def test_an_unknown_tag_is_refused() -> None:
    with pytest.raises(ModelError, match="Invalid pretrained tag"):
        Architecture("resnet18.nobody_in1k").build()


def test_arguments_that_are_no_json_are_refused() -> None:
    with pytest.raises(ModelError, match="cannot be written to a checkpoint"):
        Architecture("resnet18", {"norm_layer": nn.BatchNorm2d})


def test_arguments_are_those_json_gives_back() -> None:
    architecture = Architecture("vit_tiny_patch16_224", {"img_size": (64, 32)})
    assert architecture == Architecture.from_dict(asdict(architecture))
    assert str(architecture) == "vit_tiny_patch16_224(img_size=[64, 32])"


@pytest.mark.parametrize("data", [{}, {"name": 3, "kwargs": {}}, {"name": "x"}, "resnet18"])
def test_other_descriptions_are_refused(data: object) -> None:
    with pytest.raises(ModelError, match="not a description"):
        Architecture.from_dict(data)


def test_pretrained_without_network_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(ModelError, match=r"could not be downloaded(.|\n)*leave pretrained out"):
        Architecture("torchvision/resnet18").build(pretrained=True)
