"""Split points: "4", names or name:fanout -> a frozen choice, before anything is built."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from treeify.conversion.level_weights import LevelWeights
from treeify.conversion.levels import INPUT, Dependencies, enclosing
from treeify.errors import SplitError, described, nearest
from treeify.tracing.facts import facts
from treeify.tracing.trace import Traced
from treeify.tree import Tree, fanouts_for

# Cost of choosing a split one module deeper, in units of squared relative unevenness of one level:
# stage starts (shallow names) win unless a deeper point evens the levels out markedly.
_DEPTH_COST = 0.1
_NUMBER = re.compile(r"-?[0-9]{1,18}")


@dataclass(frozen=True)
class SplitPoint:
    """A place where the model can be split.

    Args:
        name: module path (or a function's path) that starts the part after the split.
        macs_before: MACs per image of everything the split leaves shared.
        macs_after: MACs per image of everything each branch repeats.
        live: how many tensors cross the split; 1 is a clean cut.
    """

    name: str
    macs_before: int
    macs_after: int
    live: int

    @property
    def depth(self) -> int:
        """How many modules deep the name is; stages are shallow, blocks and layers deeper."""
        return self.name.count(".")


@dataclass(frozen=True)
class Splits:
    """The chosen split points, from input to output, and their fanouts."""

    points: tuple[SplitPoint, ...]
    tree: Tree

    @property
    def names(self) -> tuple[str, ...]:
        """The points' names."""
        return tuple(point.name for point in self.points)

    @property
    def specs(self) -> tuple[str, ...]:
        """`name:fanout` for every split: exactly what to pass to get the same tree again."""
        return tuple(
            f"{point.name}:{fanout}"
            for point, fanout in zip(self.points, self.tree.fanouts, strict=True)
        )


def split_points(traced: Traced) -> list[SplitPoint]:
    """Every distinct split point of the evaluation graph, in graph order, outermost name first.

    Points that put the same nodes behind the split are one point; the outermost module names it.
    Without weights behind it a point is none.
    """
    modes = {training: Dependencies(graph) for training, graph in traced.graphs.items()}
    weights = LevelWeights(traced, modes, trained_only=False)
    return [point for point in _distinct_points(modes[False]) if weights.behind(point.name)]


def _distinct_points(dependencies: Dependencies) -> list[SplitPoint]:
    names: dict[int, str] = {}
    for name in dependencies.names():
        names.setdefault(dependencies.behind(name), name)
    names.pop(dependencies.behind(INPUT), None)  # nothing would be shared
    return sorted(_points(dependencies, names.values()), key=lambda point: point.macs_before)


def _points(dependencies: Dependencies, names: Iterable[str]) -> Iterator[SplitPoint]:
    """The split points of names, with what the nodes before and behind each cost."""
    # Of thousands of nodes, only those with MACs and those with tensors that may cross a split.
    costs: list[tuple[int, int]] = []
    tensors: list[tuple[int, int, int]] = []
    for index, node in enumerate(dependencies.nodes):
        info, bit = facts(node), 1 << index
        if info.macs:
            costs.append((bit, info.macs))
        if info.tensors and bit & dependencies.rooted:
            tensors.append((bit, dependencies.users[index], len(info.tensors)))
    for name in names:
        mask = dependencies.behind(name)
        before = sum(macs for bit, macs in costs if not bit & mask)
        after = sum(macs for bit, macs in costs if bit & mask)
        crossing = (count for bit, users, count in tensors if users & mask and not bit & mask)
        yield SplitPoint(name, before, after, sum(crossing))


def choose(
    traced: Traced,
    splits: int | str | Sequence[str],
    fanout: int = 2,
    leaves: int | None = None,
    *,
    saved: bool = False,
) -> Splits:
    """Turn what the user wrote into a frozen choice.

    Args:
        traced: the model.
        splits: how many (`4`, `"4"`), names in order (`["layer2", "layer3:4"]`, `"layer2,layer3"`).
        fanout: children per split that names none.
        leaves: how many the tree shall have, if its fanouts are to follow from that; each is then
            to have weights from elsewhere, which may differ where the model's are frozen.
        saved: whether they were chosen before, by a version that may have accepted more.

    Raises:
        SplitError: a split is unknown, repeated or out of order, there are not that many points, a
            fanout is below 2, no fanouts give as many leaves, or a level would have no weights.
    """
    specs = listed(splits)
    if isinstance(specs, int):
        _require_points(traced, specs)
    Tree((fanout,))
    named = [] if isinstance(specs, int) else [parse(spec) for spec in specs]
    explicit = [None] * specs if isinstance(specs, int) else [number for _, number in named]
    if leaves is not None:
        fanouts = fanouts_for(leaves, explicit)
    else:
        fanouts = tuple(fanout if number is None else number for number in explicit)
    tree = Tree(fanouts)
    modes = {training: Dependencies(graph) for training, graph in sorted(traced.graphs.items())}
    if isinstance(specs, int):
        weights = LevelWeights(traced, modes, trained_only=leaves is None)
        return Splits(_even_points(traced, modes, weights, specs), tree)
    points = _named_points(traced, modes, [name for name, _ in named])
    if not saved:
        _require_weights(modes[False], LevelWeights(traced, modes, trained_only=False), points)
    return Splits(points, tree)


def _require_points(traced: Traced, count: int) -> None:
    """Refuse impossible numbers before a tree is made of so many, and before looking for points.

    Raises:
        SplitError: the graph has fewer nodes than there are to be splits.
    """
    nodes = len(traced.graphs[False].nodes)
    if count > nodes:
        raise SplitError(
            f"{type(traced.skeleton).__name__} has no {count} split points.",
            expected=f"fewer splits than it has operations, {nodes:,}",
            found=f"splits={count:,}",
            next_step="Ask for fewer splits, or name them: treeify splits NAME lists the points.",
        )


def listed(splits: int | str | Sequence[str]) -> int | list[str]:
    """How many splits, or each of them: `"4"` -> `4`, `"layer2,layer3:4"` -> `["layer2", ...]`.

    Raises:
        SplitError: the number is negative, or a fanout is no number of 2 or more.
    """
    if isinstance(splits, str):
        is_number = _NUMBER.fullmatch(splits.strip())
        splits = int(splits) if is_number else [part for part in splits.split(",") if part]
    if isinstance(splits, bool) or (isinstance(splits, int) and splits < 0):
        raise SplitError(
            f"splits={described(splits)} is not a number of splits.",
            expected="0 or more",
            next_step="Name the points instead, or list them: treeify splits NAME",
        )
    if isinstance(splits, int):
        return splits
    is_listed = isinstance(splits, Sequence) and not isinstance(splits, bytes)
    if not is_listed or not all(isinstance(spec, str) for spec in splits):
        raise SplitError(
            f"splits={described(splits)} is neither a number nor a list of names.",
            expected="a number such as 2, or names such as ['layer3', 'layer4:4']",
            next_step="List every split point with its MACs: treeify splits NAME",
        )
    fanouts = [fanout for _, fanout in map(parse, splits)]
    Tree(tuple(fanout for fanout in fanouts if fanout is not None))
    return list(splits)


def parse(spec: str) -> tuple[str, int | None]:
    """`"layer3:16"` -> `("layer3", 16)`, `"layer3"` -> `("layer3", None)`."""
    name, colon, fanout = spec.strip().partition(":")
    if colon and not _NUMBER.fullmatch(fanout):
        raise SplitError(
            f"split {spec!r} has a fanout that is not a number.",
            expected="name or name:fanout, e.g. 'layer3' or 'layer3:16'",
        )
    return name, int(fanout) if colon else None


def inner_point(traced: Traced) -> SplitPoint | None:
    """The point inside a module that parts the MACs most evenly, both modes; None if there is none.

    Modules of the model itself are its stages, or hold them (`stages.2`): a point deeper than both
    is taken where there is one.
    """
    candidates = _candidates({mode: Dependencies(graph) for mode, graph in traced.graphs.items()})
    inside = [point for point in candidates if point.depth > 1]
    return min(
        inside or [point for point in candidates if point.depth],
        key=lambda point: abs(point.macs_before - point.macs_after),
        default=None,
    )


def _named_points(
    traced: Traced, modes: Mapping[bool, Dependencies], names: Sequence[str]
) -> tuple[SplitPoint, ...]:
    for training, dependencies in modes.items():
        for name in names:
            if not dependencies.behind(name):
                raise _unknown(traced, dependencies, name, training)
        for earlier, later in pairwise(names):
            _check_order(dependencies, earlier, later)
    return tuple(_points(modes[False], names))


def _unknown(traced: Traced, dependencies: Dependencies, name: str, training: bool) -> SplitError:
    """Why there is no split point of a name in one of the graphs, and what there is instead."""
    if outer := _call_around(traced, dependencies, name):
        reason = f": {why}" if (why := traced.leaf_modules.get(outer)) else ""
        return SplitError(
            f"split {name!r} is inside of {outer!r}, which runs as one call{reason}.",
            expected=f"{outer!r}, or a module outside of it",
        )
    points = [point.name for point in split_points(traced)]
    similar = nearest(name, dependencies.names())
    model = type(traced.skeleton).__name__
    return SplitError(
        f"split {name!r} names no module of {model}"
        + (" that runs in training mode." if training else "."),
        expected="a module the traced graph calls"
        + (f" (did you mean {similar}?)" if similar else f", e.g. {', '.join(points[:4])}")
        + f", or {INPUT!r}",
        next_step="List every split point with its MACs: treeify splits NAME",
    )


def _call_around(traced: Traced, dependencies: Dependencies, name: str) -> str | None:
    """The module that is one call of the graph and holds the one of a name."""
    if name not in dict(traced.skeleton.named_modules()):
        return None
    called = {str(node.target) for node in dependencies.nodes if node.op == "call_module"}
    parent = name.rpartition(".")[0]
    return next((path for path in enclosing(parent) if path in called), None)


def _check_order(dependencies: Dependencies, earlier: str, later: str) -> None:
    """Raise SplitError unless one split lies behind the other."""
    outer, inner = dependencies.behind(earlier), dependencies.behind(later)
    if outer == inner:
        problem = "is the same point as" if earlier != later else "repeats"
        raise SplitError(
            f"split {later!r} {problem} split {earlier!r}.",
            expected="every split once; give one of them a larger fanout instead,"
            f" e.g. '{earlier}:4'",
        )
    if inner & ~outer:
        raise SplitError(
            f"split {later!r} does not come after split {earlier!r}.",
            expected="splits in order from input to output, each behind the one before it",
            next_step="List the split points in order: treeify splits NAME",
        )


def _require_weights(
    dependencies: Dependencies, weights: LevelWeights, points: Sequence[SplitPoint]
) -> None:
    """Raise SplitError if a level has no parameters: its branches would all compute the same."""
    counts = [*(weights.behind(point.name) for point in points), 0]
    for index, (point, behind, after) in enumerate(zip(points, counts, counts[1:], strict=False)):
        if behind > after:
            continue
        others = [(other, weights.behind(other.name)) for other in _distinct_points(dependencies)]
        earlier = [repr(other.name) for other, count in others if count > after][-2:]
        later = [repr(other.name) for other, count in others if 0 < count < behind][:2]
        following = points[index + 1].name if index + 1 < len(points) else ""
        options = [f"{' or '.join(earlier)} in the place of {point.name!r}"] if earlier else []
        if following and later:
            options.append(f"{' or '.join(later)} in the place of {following!r}")
        raise SplitError(
            f"there are no weights behind split {point.name!r}"
            + (f" and before {following!r}" if following else "")
            + ": its branches would all compute the same.",
            expected="weights of its own in every level"
            + (f", as with {', or '.join(options)}" if options else ""),
            next_step=f"Move one of them, or leave {following!r} out: '{point.name}:4'."
            if following
            else "Move it towards the input, or leave it out.",
        )


def _candidates(modes: Mapping[bool, Dependencies]) -> dict[SplitPoint, int]:
    """Points with MACs on both sides that are there in training mode too, with their masks."""
    evaluation, training = modes[False], modes[True]
    return {
        point: evaluation.behind(point.name)
        for point in _distinct_points(evaluation)
        if point.macs_before and point.macs_after and training.behind(point.name)
    }


def _even_points(
    traced: Traced, modes: Mapping[bool, Dependencies], weights: LevelWeights, count: int
) -> tuple[SplitPoint, ...]:
    """The `count` points that even out the levels' MACs, with as few live tensors as can be."""
    if count == 0:
        return ()
    candidates = _candidates(modes)
    behind = {point: weights.behind(point.name) for point in candidates}
    candidates = {point: mask for point, mask in candidates.items() if behind[point]}
    enough = count <= len(candidates)
    for live in sorted({point.live for point in candidates} if enough else ()):
        masks = {point: mask for point, mask in candidates.items() if point.live <= live}
        if (points := _most_even(masks, behind, count)) is not None:
            return points
    raise SplitError(
        f"{type(traced.skeleton).__name__} has no {count} split points with weights between"
        " them, one behind the other.",
        expected=f"weights in the level behind every split; there are {len(candidates)} points",
        next_step="Ask for fewer splits, or name them.",
    )


def _most_even(
    masks: Mapping[SplitPoint, int], weights: Mapping[SplitPoint, int], count: int
) -> tuple[SplitPoint, ...] | None:
    """Shortest path over the points in order of MACs; None if no chain has `count` points.

    Along it fewer and fewer weights lie behind: every level has some.
    """
    first = next(iter(masks))
    even = (first.macs_before + first.macs_after) / (count + 1)

    def unevenness(macs: int) -> float:
        return (macs / even - 1) ** 2

    # Cost and points of the cheapest chain that ends at each point.
    best: list[tuple[float, tuple[SplitPoint, ...]]] = [
        (unevenness(point.macs_before) + _DEPTH_COST * point.depth, (point,)) for point in masks
    ]
    for _ in range(count - 1):
        longer: list[tuple[float, tuple[SplitPoint, ...]]] = []
        for point, mask in masks.items():
            options = [
                (cost + unevenness(point.macs_before - chain[-1].macs_before), chain)
                for cost, chain in best
                if chain[-1].macs_before < point.macs_before
                and weights[chain[-1]] > weights[point]
                and not mask & ~masks[chain[-1]]
            ]
            if options:
                cost, chain = min(options, key=lambda option: option[0])
                longer.append((cost + _DEPTH_COST * point.depth, (*chain, point)))
        best = longer
    finished = [(cost + unevenness(chain[-1].macs_after), chain) for cost, chain in best]
    return min(finished, key=lambda option: option[0])[1] if finished else None
