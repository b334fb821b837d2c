"""What lies behind every split point: MACs, parameters and bytes, which add up over levels.

A tree's cost is what level `b` holds times its branches, and a level holds what lies behind its
split but not behind the next one. So a table with one row per split point prices every tree, and
says which splits may follow one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.nn.modules.batchnorm import _BatchNorm

from treeify.conversion.level_weights import LevelWeights
from treeify.conversion.levels import Dependencies, levels_within
from treeify.conversion.splits import SplitPoint, split_points
from treeify.engine.packed_tensors import keys_read_by, named_tensors
from treeify.tracing.facts import facts
from treeify.tracing.trace import Traced

MACS, PARAMETERS, BYTES = range(3)


@dataclass(frozen=True)
class SplitCosts:
    """Split points with what each branch repeats behind them.

    Args:
        points: `P` split points, in graph order.
        behind: MACs per image, parameters, and bytes of parameters and buffers behind each point,
            `[P, 3]`.
        whole: the same of the base model, `[3]`.
        may_follow: whether point `j` may be the split after point `i`, `[P, P]`: it lies behind it,
            and the level between them has weights of its own.
        left_out: how many points there are besides, which are worse to split at.
    """

    points: tuple[SplitPoint, ...]
    behind: NDArray[np.int64]
    whole: NDArray[np.int64]
    may_follow: NDArray[np.bool_]
    left_out: int = 0

    def of_levels(self, splits: Sequence[int]) -> NDArray[np.int64]:
        """What each level of a tree holds, `[levels, 3]`; `splits` are positions of its points."""
        ends = np.concatenate([self.whole[None], self.behind[list(splits)]])
        held: NDArray[np.int64] = ends - np.concatenate([ends[1:], np.zeros_like(ends[:1])])
        return held


def split_costs(traced: Traced, *, all_points: bool = False) -> SplitCosts:
    """The costs behind the split points of a model, of those that cost alike only one.

    Args:
        traced: the model.
        all_points: whether to take points as well that several tensors cross, as inside of
            residual blocks, and those between a layer and its batch norm, which could not be folded
            into it any more.
    """
    modes = {training: Dependencies(graph) for training, graph in traced.graphs.items()}
    weights = LevelWeights(traced, modes, trained_only=False)
    there = [
        point
        for point in split_points(traced)
        if point.macs_before and point.macs_after and modes[True].behind(point.name)
    ]
    modules = dict(traced.skeleton.named_modules(remove_duplicate=False))
    points = [
        point
        for point in there
        if all_points or (point.live == 1 and not isinstance(modules.get(point.name), _BatchNorm))
    ]
    counter = _Counter(traced, modes)
    behind = np.array([counter.behind(point.name) for point in points], np.int64).reshape(-1, 3)
    masks = [[mode.behind(point.name) for mode in modes.values()] for point in points]
    own = [weights.behind(point.name) for point in points]
    may_follow = np.array(
        [
            [own[i] > own[j] and _all_inside(inner, outer) for j, inner in enumerate(masks)]
            for i, outer in enumerate(masks)
        ],
        np.bool_,
    ).reshape(len(points), len(points))
    kept = _without_doubles(points, behind, may_follow)
    return SplitCosts(
        tuple(points[index] for index in kept),
        behind[kept],
        np.array(counter.whole, np.int64),
        may_follow[np.ix_(kept, kept)],
        len(there) - len(points),
    )


def _all_inside(inner: Sequence[int], outer: Sequence[int]) -> bool:
    return all(one != other and not one & ~other for one, other in zip(inner, outer, strict=True))


def _without_doubles(
    points: Sequence[SplitPoint], behind: NDArray[np.int64], may_follow: NDArray[np.bool_]
) -> list[int]:
    """Positions of points, of those with equal costs only one that is followed by as many."""
    by_cost: dict[tuple[int, ...], list[int]] = {}
    # Better ones first: few tensors cross, the module is an outer one, and what counts no MACs, as
    # pooling, is shared.
    ranks = sorted(range(len(points)), key=lambda i: (points[i].live, points[i].depth, -i))
    for index in ranks:
        rivals = by_cost.setdefault(tuple(map(int, behind[index])), [])
        if not any(
            np.all(may_follow[rival] >= may_follow[index])
            and np.all(may_follow[:, rival] >= may_follow[:, index])
            for rival in rivals
        ):
            rivals.append(index)
    return sorted(index for rivals in by_cost.values() for index in rivals)


class _Counter:
    """Sums over the nodes and tensors behind a split, as a converted model would count them."""

    def __init__(self, traced: Traced, modes: Mapping[bool, Dependencies]) -> None:
        self._modes = modes
        evaluation = modes[False]
        self._macs = [(1 << i, facts(node).macs) for i, node in enumerate(evaluation.nodes)]
        self._macs = [(bit, macs) for bit, macs in self._macs if macs]
        tensors = dict(named_tensors(traced.skeleton))
        # By identity, since tied tensors are packed once.
        readers: dict[int, dict[bool, int]] = {
            id(tensor): dict.fromkeys(modes, 0) for tensor in tensors.values()
        }
        for mode, dependencies in modes.items():
            for i, node in enumerate(dependencies.nodes):
                for key in keys_read_by(node, traced.skeleton, tensors):
                    readers[id(tensors[key])][mode] |= 1 << i
        parameters = {id(parameter) for parameter in traced.skeleton.parameters()}
        distinct = {id(tensor): tensor for tensor in tensors.values()}
        self._tensors = [
            (
                readers[key],
                tensor.numel() if key in parameters else 0,
                tensor.numel() * tensor.element_size(),
            )
            for key, tensor in distinct.items()
        ]
        self.whole = (
            sum(macs for _, macs in self._macs),
            sum(numbers for _, numbers, _ in self._tensors),
            sum(size for _, _, size in self._tensors),
        )

    def behind(self, name: str) -> tuple[int, int, int]:
        """MACs, parameters and bytes behind a split at a name."""
        masks = {
            mode: nodes_behind(dependencies, name) for mode, dependencies in self._modes.items()
        }
        repeated = [
            (numbers, size)
            for readers, numbers, size in self._tensors
            if any(readers.values())
            and all(not nodes & ~masks[mode] for mode, nodes in readers.items())
        ]
        return (
            sum(macs for bit, macs in self._macs if bit & masks[False]),
            sum(numbers for numbers, _ in repeated),
            sum(size for _, size in repeated),
        )


def nodes_behind(dependencies: Dependencies, name: str) -> int:
    """Mask of what a split repeats: nodes behind it, and parameters that only those read."""
    level = levels_within(dependencies, [name])
    bits = "".join("1" if level[node] else "0" for node in reversed(dependencies.nodes))
    return int(bits, 2)
