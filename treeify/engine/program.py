"""A tree ready to run: its segments, and the walk through them.

A level runs *packed*, all branches of a span in one call of its segment, or *looped*, one call per
branch over views of the same parameters. Consecutive looped levels are walked depth-first, so that
a branch's activations are used by its children before the next branch is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from treeify.engine.forms import Branches, Form, cut, join, place
from treeify.engine.packed_tensors import cut_once
from treeify.tracing.facts import TensorFacts
from treeify.tree import Span, Tree

PACKED, LOOPED = "packed", "looped"
EXECUTIONS = (PACKED, LOOPED)
# A keyword: no value of a graph has such a name.
OUTPUT = "return"


@dataclass(frozen=True)
class Crossing:
    """A value that higher levels read.

    Args:
        level: where it is made.
        form: how it is held.
        known: its `TensorFacts`, in the value's own structure.
        rows: whether dropping images from the batch means dropping rows of its tensors, no more.
    """

    level: int
    form: Form
    known: Any
    rows: bool


class Held:
    """A crossing value for a span of its level's branches.

    Args:
        crossing: what the value is.
        span: the branches it is held for.
        value: the value, in the crossing's form.
    """

    def __init__(self, crossing: Crossing, span: Span, value: Any) -> None:
        self.crossing, self.span, self.value = crossing, span, value
        self._parts: Branches | None = None

    def take(self, wanted: Span) -> Any:
        """The value for part of the span; a view where memory allows."""
        form, start = self.crossing.form, wanted.start - self.span.start
        if form is Form.SHARED or wanted == self.span:
            return self.value
        if form is Form.BRANCHES:
            return Branches(self.value[start : start + wanted.size])
        if wanted.size == 1:
            return self._part(start)
        return tree_map(
            lambda fact, whole: self._piece(fact, whole, start, wanted.size),
            self.crossing.known,
            self.value,
        )

    def _piece(self, fact: TensorFacts | None, whole: Any, start: int, size: int) -> Any:
        """Some branches of a tensor; a view."""
        if fact is None:
            return whole
        dim = place(fact, self.crossing.form) or 0
        width = whole.shape[dim] // self.span.size
        return whole.narrow(dim, start * width, size * width)

    def _part(self, position: int) -> Any:
        """One branch's part, dense: operations would otherwise copy it at each reading."""
        if self._parts is None:
            crossing = self.crossing
            parts = cut(self.value, crossing.known, self.span.size, crossing.form)
            self._parts = Branches(tree_map(_dense, part, self.value) for part in parts)
        return self._parts[position]

    def tensors(self) -> list[Tensor]:
        """The tensors in the value."""
        parts = self.value if self.crossing.form is Form.BRANCHES else (self.value,)
        leaves = [leaf for part in parts for leaf in tree_leaves(part)]
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def only(self, branch: int) -> Held:
        """One branch's value in memory of its own, so that the rest can be freed."""
        wanted = Span(branch, branch + 1)
        form, start = self.crossing.form, branch - self.span.start
        if form is Form.BRANCHES:
            own: Any = Branches([tree_map(_own, self.value[start])])
        elif form in (Form.PACKED, Form.BATCH):
            own = tree_map(
                lambda fact, whole: _own(_dense(self._piece(fact, whole, start, 1), whole)),
                self.crossing.known,
                self.value,
            )
        else:
            own = tree_map(_own, self.value)
        return Held(self.crossing, wanted, own)

    def rows(self, images: Tensor) -> Held:
        """The value for some of the images."""
        known, form = self.crossing.known, self.crossing.form

        def choose(fact: TensorFacts | None, value: Any) -> Any:
            if fact is None or not fact.batched:
                return value
            if form is not Form.BATCH:
                stacked = form is Form.PACKED and fact.branch_dim != 1
                return value.index_select(int(stacked), images)
            parts = torch.unflatten(value, 0, (self.span.size, value.shape[0] // self.span.size))
            return parts.index_select(1, images).flatten(0, 1)

        if self.crossing.form is Form.BRANCHES:
            chosen: Any = Branches(tree_map(choose, known, value) for value in self.value)
        else:
            chosen = tree_map(choose, known, self.value)
        return Held(self.crossing, self.span, chosen)


def _dense(part: Any, whole: Any) -> Any:
    if not isinstance(part, Tensor):
        return part
    if part.ndim == 4 and whole.is_contiguous(memory_format=torch.channels_last):
        return part.contiguous(memory_format=torch.channels_last)
    return part.contiguous()


def _own(value: Any) -> Any:
    """A tensor that keeps no larger one alive."""
    if not isinstance(value, Tensor):
        return value
    alone = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if alone else value.clone()


@dataclass(frozen=True)
class Segment:
    """One level, ready to run.

    Args:
        level: the level.
        module: called with a span and the values of `inputs`; returns the values of `outputs`.
        inputs: names of values from lower levels.
        outputs: names of values that higher levels read.
    """

    level: int
    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """A mode's segments, from the root to the leaves.

    Args:
        tree: the tree they run.
        segments: one per level.
        image: name of the input value.
        crossings: every value that higher levels read, the input and the output by its name.
    """

    tree: Tree
    segments: tuple[Segment, ...]
    image: str
    crossings: Mapping[str, Crossing]
    last_reader: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        """Find the highest level that reads each value."""
        readers = {name: segment.level for segment in self.segments for name in segment.inputs}
        object.__setattr__(self, "last_reader", {**readers, OUTPUT: self.tree.levels})

    def start(self, x: Tensor) -> dict[str, Held]:
        """What the root's segment reads: the images."""
        return {self.image: Held(self.crossings[self.image], Span(0, 1), x)}

    def run(self, x: Tensor, leaves: Span, execution: Sequence[str] | None = None) -> Any:
        """Outputs of a range of leaves, `[N, C, H, W] -> [N, leaves, K]`.

        Args:
            x: images.
            leaves: which leaves.
            execution: how each level runs; packed if not given.
        """
        execution = execution or (PACKED,) * self.tree.levels
        return Walk(self, execution).descend(0, leaves, self.start(x))

    def needed(self, held: Mapping[str, Held], level: int) -> dict[str, Held]:
        """What segments from `level` on still read."""
        return {
            name: value for name, value in held.items() if self.last_reader.get(name, -1) >= level
        }


@dataclass
class Walk:
    """One way through a program.

    Args:
        program: the program.
        execution: `packed` or `looped`, per level.
        stop: where a walk that will be continued ends: the first leaf it does not compute.
        kept: filled with what the next leaves need, per level the values of the one branch that
            is computed but not complete.
    """

    program: Program
    execution: Sequence[str]
    stop: int | None = None
    kept: dict[int, dict[str, Held]] = field(default_factory=dict)

    def descend(self, level: int, leaves: Span, held: Mapping[str, Held]) -> Any:
        """Run the levels from `level` on for some leaves.

        Args:
            level: where to start.
            leaves: the leaves; from `level` on none of their branches has been computed.
            held: values of lower levels for their branches above `level`.

        Returns:
            The leaves' outputs, `[N, leaves, K]`.
        """
        program = self.program
        values = dict(held)
        while level < program.tree.levels:
            last = self._stage_end(level)
            values.update(self._stage(level, last, leaves, values))
            level = last + 1
            values = program.needed(values, level)
        return values[OUTPUT].value

    def extend(
        self, leaves: Span, held: Mapping[str, Held], kept: Mapping[int, Mapping[str, Held]]
    ) -> Any:
        """Run every level once, packed, for leaves that go on below several computed branches.

        Args:
            leaves: the leaves; those before them are computed.
            held: values that no branch has of its own.
            kept: values of the branches that are computed but not complete, per level.

        Returns:
            The leaves' outputs, `[N, leaves, K]`.
        """
        program, tree = self.program, self.program.tree
        values = dict(held)
        for level in range(tree.levels):
            below = tree.leaves_below(level)
            span = Span(-(-leaves.start // below), -(-leaves.stop // below))
            before = kept.get(level, {})
            made = self._call(level, span, values) if span.size else {}
            for name in {**before, **made}:
                parts = [part[name] for part in (before, made) if name in part]
                values[name] = _joined(parts)
            values = program.needed(values, level + 1)
        return values[OUTPUT].value

    def _stage_end(self, level: int) -> int:
        """The last of the levels that are walked together with `level`."""
        if self.execution[level] == LOOPED:
            while level + 1 < self.program.tree.levels and self.execution[level + 1] == LOOPED:
                level += 1
        return level

    def _stage(
        self, level: int, last: int, leaves: Span, held: Mapping[str, Held]
    ) -> dict[str, Held]:
        """Run `level..last`; the values of these levels that later ones read."""
        tree = self.program.tree
        span = tree.span(level, leaves)
        if level == last and (self.execution[level] == PACKED or span.size == 1):
            return self._call(level, span, held)
        pieces = []
        with cut_once():
            for branch in range(*span):
                here = self._call(level, Span(branch, branch + 1), held)
                if level < last:
                    below = leaves.within(branch, tree.leaves_below(level))
                    here |= self._stage(level + 1, last, below, {**held, **here})
                pieces.append(self.program.needed(here, last + 1))
        return {name: _joined([piece[name] for piece in pieces]) for name in pieces[0]}

    def _call(self, level: int, span: Span, held: Mapping[str, Held]) -> dict[str, Held]:
        """One call of a segment."""
        program, tree = self.program, self.program.tree
        segment = program.segments[level]
        inputs = []
        for name in segment.inputs:
            source = held[name]
            ratio = tree.branches[level] // tree.branches[source.crossing.level]
            inputs.append(source.take(span.parents(ratio)))
        results = segment.module(span, *inputs)
        made = {
            name: Held(program.crossings[name], span, value)
            for name, value in zip(segment.outputs, results, strict=True)
        }
        self._keep(level, span, made)
        return made

    def _keep(self, level: int, span: Span, made: Mapping[str, Held]) -> None:
        if self.stop is None or level == self.program.tree.levels - 1:
            return
        branch, rest = divmod(self.stop, self.program.tree.leaves_below(level))
        if rest and branch == span.stop - 1:
            self.kept[level] = {name: held.only(branch) for name, held in made.items()}


def _joined(pieces: Sequence[Held]) -> Held:
    """Values of neighbouring spans as one."""
    first = pieces[0]
    if len(pieces) == 1:
        return first
    span = Span(first.span.start, pieces[-1].span.stop)
    crossing = first.crossing
    values = [piece.value for piece in pieces]
    return Held(crossing, span, join(values, crossing.form, crossing.known))
