"""Versions as saved files hold them."""

import torch

import treeify
from treeify.models.versions import MODEL_LIBRARIES, versions_of


def test_versions_are_those_installed_in_the_order_asked_for() -> None:
    versions = versions_of("treeify", *MODEL_LIBRARIES)
    assert list(versions) == ["treeify", "torch", "torchvision", "timm"]
    assert versions["treeify"] == treeify.__version__
    assert versions["torch"] == torch.__version__.partition("+")[0]
