"""The two halves of the held-out images, and what is chosen and reported on them."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import treeify
from treeify.errors import DataError
from treeify.evaluation.halves import Halves, nested_answers
from treeify.models.architecture import Architecture


@pytest.fixture(scope="module")
def hne() -> treeify.HierarchicalEnsemble:
    base = Architecture("small:build", {"classes": 10})
    example = torch.zeros(1, 3, 8, 8)
    hne = treeify.hierarchicalize(
        base, ["stage1", "stage2:3"], init="fresh", example_input=example
    ).eval()
    with torch.no_grad():  # fresh heads are never sure of anything
        hne.head.weight *= 10
    return hne


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(21, 3, 8, 8, generator=generator)
    labels = torch.randint(10, (21,), generator=generator)
    empty = images[:0], labels[:0]
    return [(images[:8], labels[:8]), empty, (images[8:], labels[8:])]


def test_answers_are_those_of_the_ensemble(
    hne: treeify.HierarchicalEnsemble, batches: list[tuple[Tensor, Tensor]]
) -> None:
    logits, labels = nested_answers(hne, batches)
    images = torch.cat([images for images, _ in batches])
    for row, size in zip(logits, hne.tree.nested_sizes, strict=True):
        assert_close(row, hne.predict(images, leaves=size), rtol=1e-4, atol=1e-5)
    assert torch.equal(labels, torch.cat([labels for _, labels in batches]))


def test_every_image_is_in_one_half_and_the_seed_decides_in_which(
    hne: treeify.HierarchicalEnsemble, batches: list[tuple[Tensor, Tensor]]
) -> None:
    halves, again, others = (Halves(hne, batches, seed) for seed in (0, 0, 1))
    assert halves.images == (11, 10)
    logits = torch.cat([halves.choose_on[0], halves.report_on[0]], 1)
    everything, _ = nested_answers(hne, batches)
    assert torch.equal(logits.flatten().sort().values, everything.flatten().sort().values)
    assert torch.equal(halves.choose_on[0], again.choose_on[0])
    assert not torch.equal(halves.choose_on[0], others.choose_on[0])


def test_a_budget_is_chosen_on_one_half_and_reported_on_the_other(
    hne: treeify.HierarchicalEnsemble, batches: list[tuple[Tensor, Tensor]]
) -> None:
    halves = Halves(hne, batches, 0)
    target = (hne.count_macs(1) + hne.count_macs()) // 2
    budget = halves.budget(target)
    assert budget.images == 10
    assert budget.on(*halves.choose_on, halves.macs).macs == pytest.approx(target, rel=0.1)
    logits, labels = halves.report_on
    right = [(row.argmax(-1) == labels).double().mean().item() for row in logits]
    assert halves.fixed == pytest.approx(right)


def test_a_label_of_no_class_is_refused(
    hne: treeify.HierarchicalEnsemble, batches: list[tuple[Tensor, Tensor]]
) -> None:
    images, labels = batches[0]
    with pytest.raises(DataError, match="0 to 9"):
        Halves(hne, [(images, labels + 10)], 0)
