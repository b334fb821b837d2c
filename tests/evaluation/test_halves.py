"""The two halves of the held-out images, and what is chosen and reported on them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import treeify
from treeify.anytime.deadline import Latencies, Latency
from treeify.engine.plan import Situation
from treeify.errors import DataError, InputError
from treeify.evaluation.halves import Halves, cheapest, most_accurate, nested_answers
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
    point = halves.point(target)
    assert point.reported.images == 10
    assert point.chosen.images == 11
    assert point.chosen.thresholds == point.reported.thresholds
    assert point.chosen.macs == pytest.approx(target, rel=0.1)
    logits, labels = halves.report_on
    right = [(row.argmax(-1) == labels).double().mean().item() for row in logits]
    fixed = halves.fixed()
    assert [point.leaves for point in fixed] == [1, 3, 6]
    assert [point.reported.accuracy for point in fixed] == pytest.approx(right)
    assert [point.reported.macs for point in fixed] == halves.macs


def test_a_label_of_no_class_is_refused(
    hne: treeify.HierarchicalEnsemble, batches: list[tuple[Tensor, Tensor]]
) -> None:
    images, labels = batches[0]
    with pytest.raises(DataError, match="0 to 9"):
        Halves(hne, [(images, labels + 10)], 0)


def _points(hne: treeify.HierarchicalEnsemble, batches: list[tuple[Tensor, Tensor]]) -> Any:
    points = Halves(hne, batches, 0).sweep()
    x = torch.zeros(1, 3, 8, 8)
    transitions = ((0, 1, 1.0), (0, 3, 2.0), (0, 6, 3.0), (1, 3, 2.0), (3, 6, 4.0))
    rows = tuple(Latency(a, b, seconds, seconds, 1.0) for a, b, seconds in transitions)
    situation = Situation.of(x, training=False)
    return points, Latencies(situation, hne.plan(x), (1, 3, 6), rows, 10)


def test_thresholds_cost_the_time_of_every_stop_on_the_way(
    hne: treeify.HierarchicalEnsemble, batches: list[tuple[Tensor, Tensor]]
) -> None:
    points, latencies = _points(hne, batches)
    assert [point.seconds(latencies, point.chosen) for point in points[:3]] == [1.0, 2.0, 3.0]
    assert len(points) > 8
    for point in points[3:]:
        one, three, six = point.reported.fractions
        expected = one + 3 * three + 7 * six
        assert point.seconds(latencies, point.reported) == pytest.approx(expected)
        assert hne.count_macs(1) < point.chosen.target_macs < hne.count_macs()


def test_the_cheapest_and_the_most_accurate_are_chosen_on_one_half(
    hne: treeify.HierarchicalEnsemble, batches: list[tuple[Tensor, Tensor]]
) -> None:
    points, latencies = _points(hne, batches)
    level = sorted(point.chosen.accuracy for point in points)[len(points) // 2]
    cheap = cheapest(points, level)
    assert cheap.chosen.accuracy >= level
    assert all(
        other.chosen.macs >= cheap.chosen.macs or other.chosen.accuracy < level for other in points
    )
    best = most_accurate(points, latencies, 2.0)
    assert best.seconds(latencies, best.chosen) <= 2
    assert all(
        other.chosen.accuracy <= best.chosen.accuracy
        for other in points
        if other.seconds(latencies, other.chosen) <= 2
    )
    with pytest.raises(InputError, match="at least 1e"):
        most_accurate(points, latencies, 0.5)
    with pytest.raises(InputError, match=r"Expected at most \d+\.\d\d %"):
        cheapest(points, 1.01)


def test_one_leaf_alone_can_be_swept(
    hne: treeify.HierarchicalEnsemble, batches: list[tuple[Tensor, Tensor]]
) -> None:
    (point,) = Halves(hne.sub_ensemble(1).eval(), batches, 0).sweep()
    assert (point.leaves, point.reported.fractions) == (1, (1.0,))
