"""Levels that run looped, all or some, equal the separate networks; so do sessions."""

import copy

import pytest
import torch
import zoo

import treeify
from treeify.engine.plan import Plan
from treeify.parity.tolerance import deviation

# Those that take long are built of what others have, too.
SKIPPED = {
    *("hrnet_w18_small", "mobilenetv2_140", "efficientnet_lite0", "efficientnet_b0"),
    *("regnet_y_400mf", "mobilenet_v2"),
}
CASES = [case for case in zoo.cases() if case.name not in SKIPPED]


def _convert(case: zoo.Case) -> treeify.HierarchicalEnsemble:
    return treeify.hierarchicalize(
        case.model(), case.splits("wide"), init="perturb", example_input=case.images(1)
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_looped_and_stepwise_equal_separate_networks(case: zoo.Case) -> None:
    hne = _convert(case)
    hne.execution = "looped"
    x = case.images()
    assert treeify.verify(hne, x).worst <= 1

    hne.eval()
    with torch.no_grad():
        whole = hne.run(x, hne.leaves, Plan(("packed",) * hne.tree.levels))
    for way in ("packed", "looped"):
        precise, images, expected = hne, x, whole
        if deviation(_stepped(hne, x, way), whole) > 1:  # rounding, or a mistake?
            precise, images = copy.deepcopy(hne).double(), x.double()
            with torch.no_grad():
                expected = precise(images)
        assert deviation(_stepped(precise, images, way), expected) <= 1


def _stepped(hne: treeify.HierarchicalEnsemble, x: torch.Tensor, way: str) -> object:
    """Leaf logits of a session."""
    hne.execution = way
    session = hne.session(x)
    for size in (1, 3, 4):
        session.advance(to=size)
    assert session.cached_bytes == 0
    return session.leaf_logits


SMALL = ["mobilenet_v3_small", "vit_b_16-thin", "odd-SharedWeights", "odd-LongSkips", "odd-InPlace"]


@pytest.mark.parametrize("name", SMALL)
def test_levels_of_both_kinds_equal_separate_networks(name: str) -> None:
    case = next(case for case in zoo.cases() if case.name == name)
    hne = treeify.hierarchicalize(
        case.model(), case.splits("binary"), init="perturb", example_input=case.images(1)
    )
    hne.execution = ("packed", "looped", "packed", "looped", "looped")
    assert treeify.verify(hne, case.images()).worst <= 1
