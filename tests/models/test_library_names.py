"""Every name of the libraries, and the family it belongs to."""

import pytest

from treeify.errors import ModelError
from treeify.models.builders import check_names, family, library_names


def test_the_library_names_are_all_there_and_have_a_family() -> None:
    names = library_names()
    assert len(names) == len(set(names))
    assert {"resnet18", "torchvision/resnet18"} <= set(names)
    assert family("resnet18") == "resnet"
    assert family("torchvision/resnet18") == "torchvision/resnet"
    assert all(map(family, names))


def test_wrong_names_are_refused_together_with_the_nearest_right_ones() -> None:
    check_names(["resnet18", "torchvision/resnet18", "timm/resnet18", "sweep_models:tiny"])
    with pytest.raises(
        ModelError, match=r"(?s)2 names.*resnet1O.*'resnet18'.*5O.*'torchvision/resnet50'"
    ):
        check_names(["resnet1O", "resnet18", "torchvision/resnet5O"])
