"""The search against trying every tree, on random costs and orders of points."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import treeify
from treeify.planning.limits import numbers_of_leaves
from treeify.planning.search import Problem, Search, Trees, surpassed, unbeaten

Splits = tuple[tuple[int, int], ...]


def every_tree(problem: Problem, splits: Splits = (), leaves: int = 1) -> Iterator[Splits]:
    """All chains of points with all fanouts, one by one."""
    for point in range(len(problem.scores)):
        if splits and not problem.may_follow[splits[-1][0], point]:
            continue
        for fanout in problem.fanouts:
            if leaves * fanout <= problem.most_leaves:
                longer = (*splits, (point, fanout))
                yield longer
                yield from every_tree(problem, longer, leaves * fanout)


def cost_and_score(problem: Problem, splits: Splits) -> tuple[int, float, float]:
    """Leaves, cost and score of a tree by its levels: each holds the difference of two points."""
    branches, cost, score = 1, 0.0, 0.0
    # Of a level: what lies behind its split, less what lies behind the next, for its branches.
    behind = problem.whole
    for point, fanout in splits:
        cost += behind - problem.behind[branches][point]
        branches *= fanout
        behind = problem.behind[branches][point]
        score += np.log(fanout) * problem.scores[point]
    return branches, cost + behind, score


def brute_force(problem: Problem, budget: float) -> dict[int, set[tuple[float, float]]]:
    found: dict[int, set[tuple[float, float]]] = {}
    for splits in every_tree(problem):
        leaves, cost, score = cost_and_score(problem, splits)
        if cost <= budget:
            found.setdefault(leaves, set()).add((cost, round(score, 9)))
    return {
        leaves: {
            one
            for one in trees
            if not any(o != one and o[0] <= one[0] and o[1] >= one[1] for o in trees)
        }
        for leaves, trees in found.items()
    }


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    count = draw(st.integers(1, 5))
    # A point follows another that is smaller in both places: transitive, as splits are.
    places = draw(st.lists(st.tuples(*2 * [st.integers(0, 4)]), min_size=count, max_size=count))
    costs = draw(st.lists(st.integers(0, 30), min_size=count, max_size=count))
    fixed = draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
    scores = draw(st.lists(st.integers(-9, 0), min_size=count, max_size=count))
    fanouts = tuple(sorted(draw(st.sets(st.integers(2, 4), min_size=1, max_size=2))))
    order = np.array([[a[0] < b[0] and a[1] < b[1] for b in places] for a in places], np.bool_)
    sizes = numbers_of_leaves(fanouts, 16)
    # As times have: something for the point, and something for each of its branches.
    behind = {n: np.array(fixed) + n * np.array(costs, np.float64) for n in sizes}
    whole = float(max(behind[1]) + draw(st.integers(0, 20)))
    return Problem(behind, whole, np.array(scores, np.float64), order, fanouts, 16)


@given(problem=problems(), budget=st.one_of(st.just(np.inf), st.integers(0, 400)))
@example(
    Problem(
        {n: n * np.array([0.0, 0, 0, 1]) for n in (1, 2, 4, 8, 16)},
        1.0,
        np.array([-4.0, -6, -3, -5]),
        np.array([[0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]], np.bool_),
        (2,),
        16,
    ),
    np.inf,
)  # -6 and -3, and -5 and -4, add up to the same but for rounding
def test_the_search_finds_what_trying_every_tree_finds(problem: Problem, budget: float) -> None:
    found = {
        leaves: {(float(c), round(float(s), 9)) for c, s in zip(t.cost, t.score, strict=True)}
        for leaves, t in Search(problem, budget).run().items()
    }
    assert found == brute_force(problem, budget)


@given(problem=problems())
def test_every_tree_found_is_one_and_costs_what_it_says(problem: Problem) -> None:
    search = Search(problem)
    for leaves, trees in search.run().items():
        for cost, score, index in zip(trees.cost, trees.score, trees.index, strict=True):
            splits = search.splits(int(index))
            assert splits in set(every_tree(problem))
            assert cost_and_score(problem, splits) == (
                *(leaves, pytest.approx(cost)),
                pytest.approx(score),
            )


def trees(*pairs: tuple[float, float]) -> Trees:
    cost, score = zip(*pairs, strict=True)
    return Trees(np.array(cost), np.array(score), np.arange(len(pairs)))


def test_only_the_unbeaten_stay_in_the_order_of_their_costs() -> None:
    left = unbeaten(trees((3, 5), (1, 1), (2, 1), (3, 4), (2, 3), (4, 5)))
    assert list(zip(left.cost, left.score, strict=True)) == [(1, 1), (2, 3), (3, 5)]


def test_a_tree_is_surpassed_by_one_that_costs_no_more_and_scores_no_less() -> None:
    others = trees((2, 2), (4, 4))
    assert surpassed(trees((1, 1), (2, 2), (3, 3), (5, 4), (5, 5)), others).tolist() == [
        *(False, True, False),
        *(True, False),
    ]


def test_a_search_that_would_fill_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treeify.planning.search._MOST_TREES", 1)
    order = np.triu(np.ones((3, 3), np.bool_), 1)
    table = {n: n * np.array([3.0, 2.0, 1.0]) for n in (1, 2, 4)}
    problem = Problem(table, 4.0, np.array([-1.0, -2.0, -3.0]), order, (2,), 4)
    with pytest.raises(treeify.TreeifyError, match="too many trees that no other beats"):
        Search(problem).run()


def test_a_deep_model_takes_no_time() -> None:
    """100 points and 4 levels of 2 or 4 children: over 3 million chains of points."""
    count = 100
    behind = np.linspace(1000, 1, count).round()
    order = np.triu(np.ones((count, count), np.bool_), 1)
    sizes = numbers_of_leaves((2, 4), 64)
    table = {n: n * behind for n in sizes}
    search = Search(Problem(table, 1001.0, np.log(behind / 1001), order, (2, 4), 64))
    found = search.run()
    assert sorted(found) == sizes[1:]
    # Every tree with a single doubling is among the best of its cost.
    assert len(found[2].cost) == count
