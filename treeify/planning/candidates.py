"""From costs and limits to the trees of a plan: the search, and which of its trees are shown."""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import NoReturn

import numpy as np

from treeify.errors import InputError
from treeify.evaluation.cost import Cost
from treeify.planning.costs import BYTES, MACS, PARAMETERS, SplitCosts
from treeify.planning.forecast import Forecast
from treeify.planning.limits import MB, MS, PARAMS, Limits, amount, numbers_of_leaves
from treeify.planning.search import Problem, Search, Trees, surpassed
from treeify.planning.split_plan import Candidate
from treeify.tree import Tree

# For every number of leaves so many trees are shown, from cheap ones to what the budget allows.
_STEPS = 4
_MOST_ROWS = 16
_COLUMNS = {"macs": (MACS, 1.0), PARAMS: (PARAMETERS, 1.0), MB: (BYTES, 1e6)}


def candidates(
    costs: SplitCosts, limits: Limits, times: Forecast | None
) -> tuple[list[Candidate], int]:
    """The trees to choose from, the best first, and how many in all no other beats.

    Args:
        costs: of the model's split points.
        limits: what is asked for.
        times: of the model's parts, if they are to be forecast.

    Raises:
        InputError: there is no tree within the budget; the nearest possible is named.
    """
    budget = limits.budget_for(int(costs.whole[MACS]))
    problem = problem_of(costs, limits, times)
    search = Search(problem, budget.most)
    fewest, _ = limits.leaves
    found = {leaves: trees for leaves, trees in search.run().items() if leaves >= fewest}
    if not found:
        _refuse(costs, limits, problem)
    optimal = _unsurpassed(found)
    rows = [
        _candidate(costs, search.splits(index), times)
        for trees in optimal.values()
        for index in _shown(trees, problem.whole, budget.most)
    ]
    rows.sort(key=lambda tree: (-tree.worth, tree.nested[-1].macs))
    return rows[:_MOST_ROWS], sum(len(trees.index) for trees in optimal.values())


def problem_of(costs: SplitCosts, limits: Limits, times: Forecast | None) -> Problem:
    """What a search minimises, the budget's quantity, and what it maximises."""
    quantity = limits.budget_for(int(costs.whole[MACS])).quantity
    sizes = numbers_of_leaves(limits.fanouts, limits.leaves[1])
    if quantity == MS:
        assert times is not None
        behind = {branches: 1e3 * times.behind[branches] for branches in sizes}
        whole = 1e3 * times.whole
    else:
        column, unit = _COLUMNS[quantity]
        behind = {branches: branches * costs.behind[:, column] / unit for branches in sizes}
        whole = costs.whole[column] / unit
    scores = np.log(costs.behind[:, MACS] / costs.whole[MACS])
    fanouts, most = limits.fanouts, limits.leaves[1]
    return Problem(behind, float(whole), scores, costs.may_follow, fanouts, most)


def _unsurpassed(found: Mapping[int, Trees]) -> dict[int, Trees]:
    """Those that no tree with more leaves beats either, by their number of leaves."""
    optimal: dict[int, Trees] = {}
    for leaves in sorted(found, reverse=True):
        trees = _by_mean(found[leaves], leaves)
        keep = np.ones(len(trees.index), np.bool_)
        for larger in optimal.values():
            keep &= ~surpassed(trees, larger)
        if keep.any():
            optimal[leaves] = trees[keep]
    return optimal


def _by_mean(trees: Trees, leaves: int) -> Trees:
    """Trees with their mean own fraction as the score, which numbers of leaves can compare."""
    return Trees(trees.cost, np.exp(trees.score / log(leaves)), trees.index)


def _shown(trees: Trees, base: float, budget: float) -> list[int]:
    """Of trees by cost, the best within each part of what a budget adds to the base model."""
    if not np.isfinite(budget):
        return [int(trees.index[-1])]
    ends = base + (budget - base) * np.arange(1, _STEPS + 1) / _STEPS
    ends[-1] = budget
    # The best are the last: cost and score rise together.
    last = np.searchsorted(trees.cost, ends, side="right") - 1
    return [int(trees.index[row]) for row in sorted(set(last.tolist())) if row >= 0]


def _candidate(
    costs: SplitCosts, splits: tuple[tuple[int, int], ...], times: Forecast | None
) -> Candidate:
    """A tree of the search with everything that it costs."""
    points, fanouts = zip(*splits, strict=True)
    tree = Tree(fanouts)
    held = costs.of_levels(points)
    counts = np.array([tree.branch_count(size) for size in tree.nested_sizes])
    totals = counts @ held
    nested = tuple(
        Cost(size, int(total[MACS]), int(total[PARAMETERS]))
        for size, total in zip(tree.nested_sizes, totals, strict=True)
    )
    behind = costs.behind[list(points), MACS] / costs.whole[MACS]
    weights = np.log(fanouts) / log(tree.leaves)
    return Candidate(
        splits=tuple(f"{costs.points[point].name}:{fanout}" for point, fanout in splits),
        fanouts=fanouts,
        nested=nested,
        bytes=int(totals[-1, BYTES]),
        behind=tuple(behind.tolist()),
        mean_own=float(np.exp(weights @ np.log(behind))),
        forecast=None if times is None else times.of_tree(points, counts),
    )


def _refuse(costs: SplitCosts, limits: Limits, problem: Problem) -> NoReturn:
    """Say what the cheapest tree that has enough leaves costs.

    Raises:
        InputError: always.
    """
    budget = limits.budget_for(int(costs.whole[MACS]))
    # With equal scores, the cheapest beats all others.
    search = Search(problem.without_scores())
    found = search.run()
    fewest = limits.leaves[0]
    cheapest = [(float(found[leaves].cost[0]), leaves) for leaves in found if leaves >= fewest]
    if not cheapest:
        raise InputError(
            f"there are too few split points for {fewest} leaves.",
            expected=f"at most {max(found)} leaves, or larger fanouts",
            found=f"{len(costs.points)} points, fanouts {', '.join(map(str, limits.fanouts))}",
            next_step="Give more --fanouts, or search --all-points.",
        )
    cost, leaves = min(cheapest)
    tree = _candidate(costs, search.splits(int(found[leaves].index[0])), None)
    raise InputError(
        f"no tree of {fewest} or more leaves costs at most {budget}.",
        expected=f"at least {amount(cost, budget.quantity, up=True)}, the nearest possible:"
        f" {leaves} leaves, splits {','.join(tree.splits)}",
        found=str(budget),
        next_step="Raise the budget, ask for fewer leaves,"
        + (" search all_points (--all-points)," if costs.left_out else "")
        + " or take a smaller model.",
    )
