"""Ensembles that faults happen to."""

import torch

import treeify
from treeify.models.architecture import Architecture


def buildable() -> treeify.HierarchicalEnsemble:
    """An ensemble that commands can build again."""
    kwargs = {"num_classes": 10, "width": 0.25, "layers": [1, 1, 1, 1]}
    architecture = Architecture("treeify.models:cifar_resnet50", kwargs)
    return treeify.hierarchicalize(
        architecture, ["block4"], init="fresh", example_input=torch.zeros(1, 3, 8, 8)
    )
