"""Exact search: of all trees over a model's split points, those that no other tree beats.

A tree costs what the base model does and, for every split, what lies behind it once more for each
branch that the split adds. Its logarithmic score is a sum over the splits, too. Trees that end with
the same split and have as many leaves can go on alike, so of those only the ones that no other
beats in cost and score need to go on: Pareto-optimal trees grow from Pareto-optimal ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf, log

import numpy as np
from numpy.typing import NDArray

from treeify.errors import InputError

# Scores are sums of logarithms, which the order of the splits rounds differently.
_ROUNDING = 1e-12
# Some gigabytes; a search of a hundred points for 32 leaves takes a thousandth of it.
_MOST_TREES = 50_000_000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """What trees are made of.

    Args:
        behind: the cost behind each of `P` split points, by the number of branches that run it,
            `{branches: [P]}`: there is one entry for every number of branches up to `most_leaves`.
        whole: the cost of the base model.
        scores: what a doubling of the leaves at each point adds to a tree's score, `[P]`.
        may_follow: whether point `j` may be the split after point `i`, `[P, P]`; transitive.
        fanouts: children per split to choose from.
        most_leaves: of a tree.
    """

    behind: Mapping[int, Floats]
    whole: float
    scores: Floats
    may_follow: NDArray[np.bool_]
    fanouts: tuple[int, ...]
    most_leaves: int

    def without_scores(self) -> Problem:
        """The same where only the cost counts."""
        return replace(self, scores=np.zeros_like(self.scores))


@dataclass(frozen=True)
class Trees:
    """Trees with as many leaves, with the split that each ends with and the tree it grew from.

    Args:
        cost: of each.
        score: of each; the higher, the better.
        index: the number of each in the search's record.
    """

    cost: Floats
    score: Floats
    index: NDArray[np.int64]

    def __getitem__(self, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> Trees:
        """Some of them."""
        return Trees(self.cost[chosen], self.score[chosen], self.index[chosen])


def joined(parts: Sequence[Trees]) -> Trees:
    """Trees of several sets as one."""
    if len(parts) == 1:
        return parts[0]
    return Trees(
        np.concatenate([part.cost for part in parts]),
        np.concatenate([part.score for part in parts]),
        np.concatenate([part.index for part in parts]),
    )


def unbeaten(trees: Trees) -> Trees:
    """Those that no other of them beats: none costs as little and scores as high; by cost."""
    order = np.lexsort((-trees.score, trees.cost))
    score = trees.score[order]
    best = np.maximum.accumulate(score)
    return trees[order[np.r_[True, score[1:] > best[:-1] + _ROUNDING]]]


def surpassed(trees: Trees, others: Trees) -> NDArray[np.bool_]:
    """Which trees one of the others matches or beats: it costs no more and scores no less.

    The others are in the order of `unbeaten`: their cost and score rise together.
    """
    last = np.searchsorted(others.cost, trees.cost, side="right") - 1
    return (last >= 0) & (others.score[last] >= trees.score)


@dataclass
class Search:
    """Grows trees split by split, from the points near the input to those near the output.

    Args:
        problem: what trees are made of.
        budget: the most that a tree may cost.
    """

    problem: Problem
    budget: float = inf
    # Of every tree grown: its last split, that one's fanout, and the tree without it (-1: none).
    _record: list[NDArray[np.int32]] = field(default_factory=list, init=False)
    _count: int = field(default=0, init=False)

    def run(self) -> dict[int, Trees]:
        """The unbeaten trees within the budget, by their number of leaves."""
        start = {1: Trees(np.array([self.problem.whole]), np.zeros(1), np.array([-1]))}
        before = _nearest_before(self.problem.may_follow)
        # Trees that may go on with a split at a point, and those that end with one there.
        passing: dict[int, dict[int, Trees]] = {}
        ending: dict[int, dict[int, Trees]] = {}
        for point in np.argsort(self.problem.may_follow.sum(axis=0), kind="stable").tolist():
            sources = [start]
            for earlier in before[point]:
                sources += [passing[earlier], ending[earlier]]
            passing[point] = _unbeaten_by_leaves(sources)
            ending[point] = self._split_at(point, passing[point])
        return _unbeaten_by_leaves(list(ending.values()))

    def splits(self, index: int) -> tuple[tuple[int, int], ...]:
        """The points of a tree and their fanouts, from the input to the output."""
        record = self._records
        splits: list[tuple[int, int]] = []
        while index >= 0:
            point, fanout, index = map(int, record[index])
            splits.append((point, fanout))
        return tuple(reversed(splits))

    def _require_room(self) -> None:
        """Refuse a search that would fill the memory.

        Raises:
            InputError: there are too many trees that no other beats.
        """
        if self._count > _MOST_TREES:
            problem = self.problem
            raise InputError(
                "there are too many trees that no other beats.",
                expected=f"at most {_MOST_TREES:,} on the way to all leaves",
                found=f"{len(problem.scores)} split points, up to {problem.most_leaves} leaves,"
                f" fanouts {', '.join(map(str, problem.fanouts))}",
                next_step="Give a smaller budget, fewer leaves or fewer fanouts.",
            )

    @cached_property
    def _records(self) -> NDArray[np.int32]:
        return np.concatenate(self._record)

    def _split_at(self, point: int, trees: Mapping[int, Trees]) -> dict[int, Trees]:
        """Every tree split once more, at a point, by every fanout."""
        problem = self.problem
        grown: list[dict[int, Trees]] = []
        for leaves, shorter in trees.items():
            for fanout in problem.fanouts:
                more = leaves * fanout
                if more > problem.most_leaves:
                    continue
                added = problem.behind[more][point] - problem.behind[leaves][point]
                cost = shorter.cost + added
                within = cost <= self.budget
                parents = shorter.index[within]
                index = np.arange(self._count, self._count + len(parents))
                self._count += len(parents)
                splits = (np.full_like(parents, point), np.full_like(parents, fanout), parents)
                self._require_room()
                self._record.append(np.stack(splits, axis=1).astype(np.int32))
                score = shorter.score[within] + log(fanout) * problem.scores[point]
                grown.append({more: Trees(cost[within], score, index)})
        return _unbeaten_by_leaves(grown)


def _unbeaten_by_leaves(sources: Sequence[Mapping[int, Trees]]) -> dict[int, Trees]:
    """The unbeaten of several sets, those with as many leaves compared."""
    parts: dict[int, list[Trees]] = {}
    for source in sources:
        for leaves, trees in source.items():
            if len(trees.cost):
                parts.setdefault(leaves, []).append(trees)
    return {
        leaves: unbeaten(joined(sets)) if len(sets) > 1 else sets[0]
        for leaves, sets in parts.items()
    }


def _nearest_before(may_follow: NDArray[np.bool_]) -> list[list[int]]:
    """Of the points that each may follow, those with no other one between.

    What ends at an earlier one is among what passes or ends at them: each set is merged once for
    every pair of neighbours, not for every pair of points.
    """
    count = may_follow.astype(np.float32)
    nearest = may_follow & ~(count @ count > 0)
    return [np.flatnonzero(column).tolist() for column in nearest.T]
