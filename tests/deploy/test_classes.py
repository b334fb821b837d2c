"""The smallest model of every class timm and torchvision have: exported, and run beside PyTorch."""

from collections.abc import Iterator

import model_classes
import pytest
import torch

import treeify
from treeify.deploy.check import check_export
from treeify.parity.fresh_weights import settle

# Different kinds, and small; those after them are more of them, and all others take half an hour.
_BY_DEFAULT = ("test_resnet", "test_vit")
_THOROUGH = ("lcnet_035", "test_convnext", "sequencer2d_s", "swin_tiny_patch4_window7_224")


def _cases() -> Iterator[object]:
    for case in model_classes.CASES:
        mark = pytest.mark.thorough if case.name in _THOROUGH else pytest.mark.slow
        marks = [] if case.name in _BY_DEFAULT else [mark]
        yield pytest.param(case, id=f"{case.network}-{case.name}", marks=marks)


@pytest.mark.parametrize("case", list(_cases()))
def test_a_model_of_every_class_answers_the_same_without_pytorch(case: model_classes.Case) -> None:
    """With three branches, of which two are computed together."""
    torch.manual_seed(0)
    base = case.architecture.build()
    settle(base)
    x = torch.zeros(1, 3, case.size, case.size)
    hne = treeify.hierarchicalize(base, 1, fanout=3, init="perturb", example_input=x)
    manifest = check_export(hne)
    assert [(step["start"], step["leaves"]) for step in manifest["steps"]] == [(0, 1), (1, 3)]
    assert all(step["parity"]["batches"] == [1, 3] for step in manifest["steps"])
    parameters = sum(step["parameters"] for step in manifest["steps"])
    assert parameters == hne.count_parameters()
