"""What plans say trees cost, against what the converted models count."""

import copy
import time

import pytest
import torch
import zoo
from torch import nn

import treeify
from treeify.conversion.assemble import assemble, trace_model
from treeify.conversion.splits import choose, split_points
from treeify.planning.candidates import candidates
from treeify.planning.costs import SplitCosts, split_costs
from treeify.planning.limits import limits

# One of each kind; the others are swept by the thorough tests.
KINDS = ("mobilenet_v3_small", "resnet18-thin", "vit_b_16-thin", "swin_t-thin", "densenet121-thin")
QUICK = [case for case in zoo.CASES if case.name in KINDS]
OTHERS = [case for case in zoo.CASES if case.name not in KINDS]


def check_plan(model: nn.Module, example: torch.Tensor, *, all_points: bool = False) -> None:
    """Costs of every nested size of the candidates equal those of the converted model."""
    found = treeify.plan(
        model, example_input=example, leaves=(2, 16), fanouts=(2, 4), all_points=all_points
    )
    # Without values, trees of any size are made at once.
    on_meta = copy.deepcopy(model).to("meta")
    traced = trace_model(model, None, example)
    for candidate in (*found.candidates[:3], found.candidates[-1]):
        hne = assemble(on_meta, None, list(candidate.splits), traced=traced)
        assert hne.tree == candidate.tree
        for cost in candidate.nested:
            assert cost.macs == hne.count_macs(cost.leaves)
            assert cost.parameters == hne.count_parameters(cost.leaves)
        tensors = [*hne.parameters(), *hne.buffers()]
        assert candidate.bytes == sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("all_points", [False, True])
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_planned_costs_are_those_of_the_converted_model(case: zoo.Case, all_points: bool) -> None:
    check_plan(case.build(), case.images(1), all_points=all_points)


@pytest.mark.thorough
@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_planned_costs_are_those_of_the_converted_model_everywhere(case: zoo.Case) -> None:
    check_plan(case.build(), case.images(1))


def costs_of(case: zoo.Case, *, all_points: bool = False) -> SplitCosts:
    return split_costs(trace_model(case.build(), None, case.images(1)), all_points=all_points)


def seconds_of_planning(case: zoo.Case) -> float:
    """The longest that planning takes after tracing, by any points and with many trees.

    Of the processor: a machine that does something else meanwhile stretches the others.
    """
    traced = trace_model(case.build(), None, case.images(1))
    longest = 0.0
    for all_points in (False, True):
        begin = time.process_time()
        costs = split_costs(traced, all_points=all_points)
        candidates(costs, limits((None, None), (None,) * 4, (4, 32), (2, 4)), None)
        longest = max(longest, time.process_time() - begin)
    return longest


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_planning_takes_less_than_five_seconds_after_tracing(case: zoo.Case) -> None:
    assert seconds_of_planning(case) < 5


@pytest.mark.thorough
@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_planning_takes_less_than_five_seconds_everywhere(case: zoo.Case) -> None:
    assert seconds_of_planning(case) < 5


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_a_split_may_follow_where_choosing_both_is_accepted(case: zoo.Case) -> None:
    traced = trace_model(case.build(), None, case.images(1))
    costs = split_costs(traced, all_points=True)
    names = [point.name for point in costs.points]
    step = max(1, len(names) // 8)
    for first in range(0, len(names), step):
        for second in range(0, len(names), step):
            if costs.may_follow[first, second]:
                assert choose(traced, [names[first], names[second]]).names == (
                    names[first],
                    names[second],
                )
            else:
                with pytest.raises(treeify.TreeifyError):
                    choose(traced, [names[first], names[second]])


def test_points_are_those_of_the_splits_command_but_for_doubles() -> None:
    (case,) = (case for case in QUICK if case.name == "resnet18-thin")
    traced = trace_model(case.build(), None, case.images(1))
    listed = [point for point in split_points(traced) if point.macs_before and point.macs_after]
    costs = split_costs(traced, all_points=True)
    assert set(costs.points) <= set(listed)
    # Pooling before a stage counts nothing: the stage names the point.
    assert "layer1" in [point.name for point in costs.points]
    assert "maxpool" not in [point.name for point in costs.points]
    assert {point.macs_after for point in costs.points} == {point.macs_after for point in listed}


def test_points_that_several_tensors_cross_are_left_out_and_counted() -> None:
    (case,) = (case for case in QUICK if case.name == "resnet18-thin")
    clean, every = costs_of(case), costs_of(case, all_points=True)
    assert {point.live for point in clean.points} == {1}
    assert "bn1" in [point.name for point in every.points]
    assert "bn1" not in [point.name for point in clean.points]
    assert set(clean.points) < set(every.points)
    assert clean.left_out > 0 == every.left_out


def test_levels_hold_what_adds_up_to_the_base_model() -> None:
    costs = costs_of(QUICK[0])
    held = costs.of_levels([0, 3, 5])
    assert held.shape == (4, 3)
    assert held.sum(axis=0).tolist() == costs.whole.tolist()
