"""Split points: "4", names or name:fanout -> a frozen choice, printed before anything is rewritten.

A split at a module means: from that module's nodes on, every branch becomes `fanout` branches. What
does not depend on the module stays shared, so a node's level is the number of splits among its
ancestors (itself included).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import fx

from treeify.errors import SplitError, nearest
from treeify.tracing.facts import facts
from treeify.tracing.trace import Traced
from treeify.tree import Tree, fanouts_for

INPUT = "input"

# Cost of choosing a split one module deeper, in units of squared relative unevenness of one level:
# stage starts (shallow names) win unless a deeper point evens the levels out markedly.
_DEPTH_COST = 0.1


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


class _Reach:
    """Which nodes depend on which, as one bit mask per node over the graph's order."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        position = {node: index for index, node in enumerate(self.nodes)}
        self.below = [0] * len(self.nodes)
        for index in reversed(range(len(self.nodes))):
            mask = 1 << index
            for user in self.nodes[index].users:
                mask |= self.below[position[user]]
            self.below[index] = mask
        self.users = [sum(1 << position[user] for user in node.users) for node in self.nodes]
        # What hangs on the input; the rest (parameters, constants) is nobody's child.
        self.rooted = 0
        for index, node in enumerate(self.nodes):
            if node.op == "placeholder":
                self.rooted |= self.below[index]
        rooted = [index for index in range(len(self.nodes)) if self.rooted >> index & 1]
        # By the name of everything a node belongs to, what hangs on it.
        self._after: dict[str, int] = {}
        for index in rooted:
            for name in _belongs_to(self.nodes[index]):
                self._after[name] = self._after.get(name, 0) | self.below[index]
        self._macs = [(1 << index, facts(node).macs) for index, node in enumerate(self.nodes)]
        self._macs = [(bit, macs) for bit, macs in self._macs if macs]
        tensors = [(index, len(facts(self.nodes[index]).tensors)) for index in rooted]
        self._tensors = [(1 << index, self.users[index], own) for index, own in tensors if own]

    def after(self, name: str) -> int:
        """Mask of every node that a split at `name` puts behind it; 0 if there is no such node."""
        return self._after.get(name, 0)

    def point(self, name: str, mask: int) -> SplitPoint:
        """What a split with this mask costs."""
        before = sum(macs for bit, macs in self._macs if not bit & mask)
        after = sum(macs for bit, macs in self._macs if bit & mask)
        crossing = (own for bit, users, own in self._tensors if users & mask and not bit & mask)
        return SplitPoint(name, before, after, sum(crossing))


def _belongs_to(node: fx.Node) -> set[str]:
    """Every name of a split point that a node is part of."""
    if node.op == "output":
        return set()
    known = facts(node)
    names = {known.path, *_above(known.scope)}
    return names if node.op == "placeholder" else names | {INPUT}


def _above(scope: str) -> list[str]:
    """A module's path and those of the modules around it, the outermost first."""
    parts = scope.split(".") if scope else []
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def split_points(traced: Traced) -> list[SplitPoint]:
    """Every distinct split point of the evaluation graph, in graph order, outermost name first.

    Points that put the same nodes behind the split are one point; the outermost module names it.
    """
    return _points(_Reach(traced.graphs[False]))


def _points(reach: _Reach) -> list[SplitPoint]:
    everything = reach.after(INPUT)
    points, seen = [], {everything}
    for name in _names(reach.nodes):
        mask = reach.after(name)
        if mask not in seen:
            seen.add(mask)
            points.append(reach.point(name, mask))
    return sorted(points, key=lambda point: point.macs_before)


def _names(nodes: Iterable[fx.Node]) -> list[str]:
    """Module and function paths in graph order, outer modules before inner ones."""
    names: dict[str, None] = {}
    for node in nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        known = facts(node)
        names |= dict.fromkeys([*_above(known.scope), known.path])
    return list(names)


def choose(
    traced: Traced,
    splits: int | str | Sequence[str],
    fanout: int = 2,
    leaves: int | None = None,
) -> Splits:
    """Turn what the user wrote into a frozen choice.

    Args:
        traced: the model.
        splits: how many (`4`, `"4"`), names in order (`["layer2", "layer3:4"]`, `"layer2,layer3"`).
        fanout: children per split that names none.
        leaves: how many the tree shall have, if its fanouts are to follow from that.

    Raises:
        SplitError: a split is unknown, repeated or out of order, there are not that many points, a
            fanout is below 2, or no fanouts give as many leaves.
    """
    specs = listed(splits)
    named = [] if isinstance(specs, int) else [parse(spec) for spec in specs]
    explicit = [None] * specs if isinstance(specs, int) else [own for _, own in named]
    if leaves is not None:
        fanouts = fanouts_for(leaves, explicit)
    else:
        fanouts = tuple(fanout if own is None else own for own in explicit)
    tree = Tree(fanouts)
    if isinstance(specs, int):
        return Splits(_even_points(traced, specs), tree)
    return Splits(_named_points(traced, [name for name, _ in named]), tree)


def listed(splits: int | str | Sequence[str]) -> int | list[str]:
    """How many splits, or each of them: `"4"` -> `4`, `"layer2,layer3:4"` -> `["layer2", ...]`.

    Raises:
        SplitError: the number is negative, or a fanout is no number of 2 or more.
    """
    if isinstance(splits, str):
        is_number = re.fullmatch(r"-?\d+", splits.strip())
        splits = int(splits) if is_number else [part for part in splits.split(",") if part]
    if isinstance(splits, bool) or (isinstance(splits, int) and splits < 0):
        raise SplitError(f"splits={splits!r} is not a number of splits.", expected="0 or more")
    if isinstance(splits, int):
        return splits
    if not isinstance(splits, Sequence) or not all(isinstance(spec, str) for spec in splits):
        raise SplitError(
            f"splits={splits!r} is neither a number nor a list of names.",
            expected="a number such as 2, or names such as ['layer3', 'layer4:4']",
        )
    fanouts = [fanout for _, fanout in map(parse, splits)]
    Tree(tuple(fanout for fanout in fanouts if fanout is not None))
    return list(splits)


def parse(spec: str) -> tuple[str, int | None]:
    """`"layer3:16"` -> `("layer3", 16)`, `"layer3"` -> `("layer3", None)`."""
    name, colon, fanout = spec.strip().partition(":")
    if colon and not re.fullmatch(r"-?\d+", fanout):
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
    candidates = _candidates(traced, _Reach(traced.graphs[False]))
    inside = [point for point in candidates if point.depth > 1]
    return min(
        inside or [point for point in candidates if point.depth],
        key=lambda point: abs(point.macs_before - point.macs_after),
        default=None,
    )


def _named_points(traced: Traced, names: Sequence[str]) -> tuple[SplitPoint, ...]:
    points = []
    for training, graph in sorted(traced.graphs.items()):
        reach = _Reach(graph)
        masks = [_mask(traced, reach, name, training) for name in names]
        for (earlier, outer), (later, inner) in pairwise(zip(names, masks, strict=True)):
            _check_order(earlier, outer, later, inner)
        if not training:
            points = [reach.point(name, mask) for name, mask in zip(names, masks, strict=True)]
    return tuple(points)


def _mask(traced: Traced, reach: _Reach, name: str, training: bool) -> int:
    mask = reach.after(name)
    if mask:
        return mask
    if closed := _closed_around(traced, reach.nodes, name):
        reason = f": {why}" if (why := traced.leaf_modules.get(closed)) else ""
        raise SplitError(
            f"split {name!r} is inside of {closed!r}, which runs as one call{reason}.",
            expected=f"{closed!r}, or a module outside of it",
        )
    known = [point.name for point in split_points(traced)]
    all_names = _names(reach.nodes)
    similar = nearest(name, all_names)
    model = type(traced.skeleton).__name__
    raise SplitError(
        f"split {name!r} names no module of {model}"
        + (" that runs in training mode." if training else "."),
        expected="a module the traced graph calls"
        + (f" (did you mean {similar}?)" if similar else f", e.g. {', '.join(known[:4])}")
        + f", or {INPUT!r}",
        next_step="List every split point with its MACs: treeify splits NAME",
    )


def _closed_around(traced: Traced, nodes: Iterable[fx.Node], name: str) -> str | None:
    """The module that is one call of the graph and holds the one of a name."""
    if name not in dict(traced.skeleton.named_modules()):
        return None
    called = {str(node.target) for node in nodes if node.op == "call_module"}
    parts = name.split(".")
    outer = (".".join(parts[:count]) for count in range(1, len(parts)))
    return next((path for path in outer if path in called), None)


def _check_order(earlier: str, outer: int, later: str, inner: int) -> None:
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


def _candidates(traced: Traced, reach: _Reach) -> list[SplitPoint]:
    """Points with MACs on both sides that are there in training mode too.

    Args:
        traced: the model.
        reach: of its evaluation graph.
    """
    trainable = _Reach(traced.graphs[True])
    points = (point for point in _points(reach) if point.macs_before and point.macs_after)
    return [point for point in points if trainable.after(point.name)]


def _even_points(traced: Traced, count: int) -> tuple[SplitPoint, ...]:
    """The `count` points that even out the levels' MACs, with as few live tensors as can be."""
    reach = _Reach(traced.graphs[False])
    candidates = _candidates(traced, reach)
    masks = {point.name: reach.after(point.name) for point in candidates}
    for live in sorted({point.live for point in candidates}):
        chosen = _most_even([point for point in candidates if point.live <= live], masks, count)
        if chosen is not None:
            return chosen
    if count == 0:
        return ()
    raise SplitError(
        f"{type(traced.skeleton).__name__} has no {count} split points one behind the other.",
        expected=f"at most as many splits as it has layers, {len(candidates)} points here",
        next_step="Ask for fewer splits, or name them.",
    )


def _most_even(
    points: Sequence[SplitPoint], masks: dict[str, int], count: int
) -> tuple[SplitPoint, ...] | None:
    """Shortest path over the points in order of MACs; None if no chain has `count` points."""
    if count == 0:
        return ()
    total = points[0].macs_before + points[0].macs_after if points else 0
    share = total / (count + 1)

    def unevenness(macs: int) -> float:
        return (macs / share - 1) ** 2

    # best[point] = (cost, names) of the cheapest chain that ends at the point
    best: dict[str, tuple[float, tuple[SplitPoint, ...]]] = {
        point.name: (unevenness(point.macs_before) + _DEPTH_COST * point.depth, (point,))
        for point in points
    }
    for _ in range(count - 1):
        longer: dict[str, tuple[float, tuple[SplitPoint, ...]]] = {}
        for point in points:
            options = [
                (cost + unevenness(point.macs_before - chain[-1].macs_before), chain)
                for cost, chain in best.values()
                if chain[-1].macs_before < point.macs_before
                and not masks[point.name] & ~masks[chain[-1].name]
            ]
            if options:
                cost, chain = min(options, key=lambda option: option[0])
                longer[point.name] = (cost + _DEPTH_COST * point.depth, (*chain, point))
        best = longer
    finished = [(cost + unevenness(chain[-1].macs_after), chain) for cost, chain in best.values()]
    return min(finished, key=lambda option: option[0])[1] if finished else None


def levels(graph: fx.Graph, names: Sequence[str]) -> dict[fx.Node, int]:
    """Every node's level: the number of splits among its ancestors, itself included.

    A node without ancestors (a parameter, a constant) takes the lowest level that reads it; one
    that nothing reads (`self.scale.data.clamp_(0, 1)`) that of the lowest reader of the same state.
    """
    reach = _Reach(graph)
    masks = [reach.after(name) for name in names]
    level = {
        node: sum(mask >> index & 1 for mask in masks) for index, node in enumerate(reach.nodes)
    }
    free = [node for index, node in enumerate(reach.nodes) if not reach.rooted >> index & 1]
    unread = _unread(free)
    for node in reversed(free):
        if node not in unread:
            readers = (level[user] for user in node.users if user not in unread)
            level[node] = min(readers, default=0)
    read: dict[str, int] = {}
    for node in free:
        if node.op == "get_attr" and node not in unread:
            target = str(node.target)
            read[target] = min(level[node], read.get(target, level[node]))
    for node in reversed(free):
        if node in unread:
            above = [level[user] for user in node.users]
            above += [read[target] for target in _state(node) if target in read]
            level[node] = min(above, default=0)
    return level


def _unread(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Of a graph's last nodes and those before them, the ones that no value is computed from."""
    found: set[fx.Node] = set()
    for node in reversed(nodes):
        if node.op != "output" and all(user in found for user in node.users):
            found.add(node)
    return found


def _state(node: fx.Node) -> set[str]:
    """Parameters, buffers and constants that a node without other ancestors is computed from."""
    found, left = {node}, [node]
    while left:
        more = [source for source in left.pop().all_input_nodes if source not in found]
        found.update(more)
        left += more
    return {str(own.target) for own in found if own.op == "get_attr"}
