"""`treeify.plan`: which trees it proposes, in which order, and what it says of them."""

import json
from typing import Any

import numpy as np
import pytest
import small
import torch
from torch import nn

import treeify
from treeify.models import cifar_resnet50
from treeify.models.architecture import Architecture
from treeify.planning.split_plan import RANKING, SPLIT_PLAN, SplitPlan

EXAMPLE = torch.zeros(1, 3, 32, 32)


def model() -> nn.Module:
    return cifar_resnet50(width=0.25, layers=[1, 2, 2, 1])


def planned(**asked: Any) -> SplitPlan:
    return treeify.plan(model(), example_input=EXAMPLE, **asked)


PLANNED = planned(fanouts=(2, 4))


def test_candidates_keep_to_the_budget_and_the_range_of_leaves() -> None:
    for tree in PLANNED.candidates:
        assert 4 <= tree.leaves <= 16
        assert tree.nested[-1].macs <= PLANNED.budget.most == 4 * PLANNED.base.macs
        assert set(tree.fanouts) <= {2, 4}
        assert tree.nested[0] == PLANNED.base
        assert [cost.leaves for cost in tree.nested] == list(tree.tree.nested_sizes)


@pytest.mark.parametrize("option", ["max_macs", "max_params", "max_mb"])
def test_each_budget_is_kept(option: str) -> None:
    quantity = option.removeprefix("max_")
    most = np.median([tree.cost(quantity) for tree in PLANNED.candidates])
    found = planned(**{option: float(most)})
    assert found.budget.quantity == quantity
    assert all(tree.cost(quantity) <= most for tree in found.candidates)


def test_no_candidate_beats_another() -> None:
    for one in PLANNED.candidates:
        assert not any(
            other.leaves >= one.leaves
            and other.mean_own >= one.mean_own
            and other.nested[-1].macs <= one.nested[-1].macs
            for other in PLANNED.candidates
            if other is not one
        )


def test_the_ranking_is_by_leaves_times_mean_own_fraction() -> None:
    worths = [tree.leaves * tree.mean_own for tree in PLANNED.candidates]
    assert worths == sorted(worths, reverse=True)
    assert "leaves times mean own fraction" in RANKING
    assert "accuracy is not known before training" in RANKING
    assert RANKING in str(PLANNED)


def test_own_is_what_no_other_leaf_shares() -> None:
    for tree in PLANNED.candidates[:4]:
        hne = treeify.hierarchicalize(
            model(), list(tree.splits), init="fresh", example_input=EXAMPLE
        )
        held = [0] * hne.tree.levels
        for node in hne.conversion.nodes:
            held[node.level] += node.macs
        assert tree.own == pytest.approx(held[-1] / sum(held))
        behind = [sum(held[level:]) / sum(held) for level in range(1, len(held))]
        assert tree.behind == pytest.approx(behind)
        doublings = np.log2(tree.fanouts)
        mean = np.prod(np.array(behind) ** (doublings / doublings.sum()))
        assert tree.mean_own == pytest.approx(mean)


def test_without_a_given_budget_there_are_trees_of_a_quarter_of_it_too() -> None:
    most, base = PLANNED.budget.most, PLANNED.base.macs
    quarters = {
        int(4 * (tree.nested[-1].macs - base) / (most - base) - 1e-9) for tree in PLANNED.candidates
    }
    assert quarters == {0, 1, 2, 3}
    assert PLANNED.optimal > len(PLANNED.candidates)


def test_a_pick_is_a_row() -> None:
    second = PLANNED.pick(2)
    assert second.chosen == PLANNED.candidates[1] == planned(fanouts=(2, 4), pick=2).chosen
    assert second.sentence.startswith("Pick 2 of ")
    assert PLANNED.chosen == PLANNED.candidates[0]


def test_the_sentence_says_what_the_pick_costs() -> None:
    tree = PLANNED.chosen
    ratio = tree.nested[-1].macs / PLANNED.base.macs
    for part in (
        f"{tree.leaves} leaves for {tree.nested[-1].macs:,} MACs",
        f"({ratio:.2f} x one model, {ratio / tree.leaves:.0%} of {tree.leaves} independent ones)",
        f"newcomers own {tree.mean_own:.0%} of a leaf on average",
    ):
        assert part in PLANNED.sentence


def test_a_plan_goes_to_json_and_back() -> None:
    text = SPLIT_PLAN.dump_json(PLANNED)
    assert SPLIT_PLAN.validate_json(text) == PLANNED
    assert json.loads(text)["candidates"][0]["nested"][0]["macs"] == PLANNED.base.macs


def test_times_that_nobody_asked_for_are_refused() -> None:
    with pytest.raises(treeify.TreeifyError, match="made with max_ms or measure"):
        PLANNED.chosen.cost("ms")


def test_a_module_is_left_alone_and_gets_the_same_plan_as_its_name() -> None:
    net = model().train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = treeify.plan(net, example_input=EXAMPLE)
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    kwargs = {"width": 0.25, "layers": [1, 2, 2, 1]}
    built = Architecture("treeify.models:cifar_resnet50", kwargs)
    by_name = treeify.plan(built, example_input=EXAMPLE)
    assert by_name.candidates == found.candidates
    assert by_name.architecture == built


def test_a_module_that_nobody_can_build_has_no_recipe() -> None:
    found = treeify.plan(small.build(), example_input=small.EXAMPLE, leaves=4)
    assert found.model == "SmallNet"
    assert found.recipe is None
    hne = treeify.hierarchicalize(
        small.build(), list(found.chosen.splits), init="fresh", example_input=small.EXAMPLE
    )
    assert hne.leaves == 4


def test_points_left_out_are_told() -> None:
    assert "more split points were left out" in "".join(PLANNED.notes)
    every = planned(all_points=True)
    assert "left out" not in "".join(every.notes)
    assert every.points > PLANNED.points
    # More choice is never worse.
    assert every.chosen.worth >= planned().chosen.worth
