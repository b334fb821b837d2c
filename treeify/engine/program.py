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
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from treeify.engine.forms import Branches, Form, concat_dim, join, unpack
from treeify.engine.packed_tensors import chunk_once
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
        form: the form it takes.
        facts: the base value's `TensorFacts`, in the value's own structure.
        rows: whether dropping images from the batch means dropping rows of its tensors, no more.
    """

    level: int
    form: Form
    facts: Any
    rows: bool


class CrossingValue:
    """A value that higher levels read, in its crossing's form for a span of branches."""

    def __init__(self, crossing: Crossing, span: Span, value: Any) -> None:
        self.crossing, self.span, self.value = crossing, span, value
        self._dense_branches: Branches | None = None

    def slice(self, span: Span) -> Any:
        """The value for part of the span; a view where memory allows."""
        form, start = self.crossing.form, span.start - self.span.start
        if form is Form.SHARED or span == self.span:
            return self.value
        if form is Form.BRANCHES:
            return Branches(self.value[start : start + span.size])
        if span.size == 1:
            return self._dense_branch(start)
        return self._narrow(start, span.size)

    def _narrow(self, start: int, size: int) -> Any:
        """Some branches of a value that is packed or in the batch; views."""

        def narrow(fact: TensorFacts | None, tensor: Any) -> Any:
            if fact is None:
                return tensor
            dim = concat_dim(fact, self.crossing.form) or 0
            width = tensor.shape[dim] // self.span.size
            return tensor.narrow(dim, start * width, size * width)

        return tree_map(narrow, self.crossing.facts, self.value)

    def _dense_branch(self, position: int) -> Any:
        """One branch's part, dense: operations would otherwise copy it at each reading."""
        if self._dense_branches is None:
            crossing = self.crossing
            count = self.span.size
            branches = unpack(self.value, crossing.facts, count, crossing.form, unbind=False)
            self._dense_branches = Branches(
                tree_map(_dense, branch, self.value) for branch in branches
            )
        return self._dense_branches[position]

    def tensors(self) -> list[Tensor]:
        """The tensors in the value."""
        parts = self.value if self.crossing.form is Form.BRANCHES else (self.value,)
        return [leaf for part in parts for leaf in tree_leaves(part) if isinstance(leaf, Tensor)]

    def branch(self, index: int) -> CrossingValue:
        """One branch's value in memory of its own, so that the other branches' can be freed."""
        form, start, value = self.crossing.form, index - self.span.start, self.value
        if form in (Form.PACKED, Form.BATCH):
            value = tree_map(_dense, self._narrow(start, 1), value)
        if form is Form.BRANCHES:
            value = Branches([tree_map_only(Tensor, _unshared, value[start])])
        else:
            value = tree_map_only(Tensor, _unshared, value)
        return CrossingValue(self.crossing, Span(index, index + 1), value)

    def select(self, images: Tensor) -> CrossingValue:
        """The value for some of the images."""
        facts, form = self.crossing.facts, self.crossing.form

        def rows(fact: TensorFacts | None, value: Any) -> Any:
            if fact is None or not fact.batched:
                return value
            if form is not Form.BATCH:
                stacked = form is Form.PACKED and fact.branch_dim != 1
                return value.index_select(int(stacked), images)
            parts = torch.unflatten(value, 0, (self.span.size, value.shape[0] // self.span.size))
            return parts.index_select(1, images).flatten(0, 1)

        if form is Form.BRANCHES:
            selected: Any = Branches(tree_map(rows, facts, value) for value in self.value)
        else:
            selected = tree_map(rows, facts, self.value)
        return CrossingValue(self.crossing, self.span, selected)


def _dense(part: Any, tensor: Any) -> Any:
    """Part of a tensor without gaps, in the memory format of the tensor."""
    if not isinstance(part, Tensor):
        return part
    # The part itself cannot tell: a slice of channels is contiguous in neither format.
    if part.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return part.contiguous(memory_format=torch.channels_last)
    return part.contiguous()


def _unshared(tensor: Tensor) -> Tensor:
    """A tensor that keeps no larger one alive."""
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone()


@dataclass(frozen=True)
class Segment:
    """One level, ready to run.

    Its module is called with a span and the values of `inputs`, which come from lower levels, and
    returns those of `outputs`, which higher levels read.
    """

    level: int
    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """A mode's segments, one per level from the root to the leaves.

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

    def start(self, x: Tensor) -> dict[str, CrossingValue]:
        """What the root's segment reads: the images."""
        return {self.image: CrossingValue(self.crossings[self.image], Span(0, 1), x)}

    def run(self, x: Tensor, leaves: Span, execution: Sequence[str] | None = None) -> Any:
        """Outputs of a range of leaves, `[N, C, H, W] -> [N, leaves, K]`, by default packed."""
        execution = execution or (PACKED,) * self.tree.levels
        return Walk(self, execution).descend(0, leaves, self.start(x))

    def needed(self, values: Mapping[str, CrossingValue], level: int) -> dict[str, CrossingValue]:
        """What segments from `level` on still read; all else can be freed."""
        return {
            name: value for name, value in values.items() if self.last_reader.get(name, -1) >= level
        }


@dataclass
class Walk:
    """One way through a program, stage by stage.

    A stage is one packed level, or as many looped levels as follow one another. Within a stage the
    walk is depth-first: a branch's activations are read by its children while they are in the
    cache, and freed before the next branch is computed. A packed level ends a stage, since its one
    call needs all branches of the level above.

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
    kept: dict[int, dict[str, CrossingValue]] = field(default_factory=dict)

    def descend(self, level: int, leaves: Span, values: Mapping[str, CrossingValue]) -> Any:
        """Run the levels from `level` on for leaves none of whose branches is computed there.

        `values` are of lower levels, for the leaves' branches above `level`; returns the leaves'
        outputs, `[N, leaves, K]`.
        """
        while level < self.program.tree.levels:
            last = self._stage_end(level)
            values = {**values, **self._stage(level, last, leaves, values)}
            level = last + 1
            values = self.program.needed(values, level)
        return values[OUTPUT].value

    def extend(
        self,
        leaves: Span,
        start: Mapping[str, CrossingValue],
        kept: Mapping[int, Mapping[str, CrossingValue]],
    ) -> Any:
        """Run every level once, packed, for leaves that go on below several computed branches.

        The leaves before them are computed. `start` are the images, where a later level reads
        them; `kept` are, per level, values of the branch that is computed but not complete.
        """
        program, tree = self.program, self.program.tree
        values = dict(start)
        for level in range(tree.levels):
            # Both ends rounded up: a branch that has a computed leaf is computed itself.
            below = tree.leaves_below(level)
            span = Span(-(-leaves.start // below), -(-leaves.stop // below))
            earlier = kept.get(level, {})
            outputs = self.call(level, span, values) if span.size else {}
            for name in {**earlier, **outputs}:
                parts = [part[name] for part in (earlier, outputs) if name in part]
                values[name] = _joined(parts)
            values = program.needed(values, level + 1)
        return values[OUTPUT].value

    def _stage_end(self, level: int) -> int:
        """The last of the levels that are walked together with `level`."""
        while tuple(self.execution[level : level + 2]) == (LOOPED, LOOPED):
            level += 1
        return level

    def _stage(
        self, level: int, last: int, leaves: Span, values: Mapping[str, CrossingValue]
    ) -> dict[str, CrossingValue]:
        """Run `level..last`; the values of these levels that later ones read."""
        tree = self.program.tree
        span = tree.span(level, leaves)
        if level == last and (self.execution[level] == PACKED or span.size == 1):
            return self.call(level, span, values)
        pieces = []
        # Gradients of the branches' views of parameters are put together once for the whole loop.
        with chunk_once():
            for branch in range(*span):
                outputs = self.call(level, Span(branch, branch + 1), values)
                if level < last:
                    below = leaves.within(branch, tree.leaves_below(level))
                    outputs |= self._stage(level + 1, last, below, {**values, **outputs})
                # What only this branch's children read is freed here, before the next branch.
                pieces.append(self.program.needed(outputs, last + 1))
        return {name: _joined([piece[name] for piece in pieces]) for name in pieces[0]}

    def call(
        self, level: int, span: Span, values: Mapping[str, CrossingValue]
    ) -> dict[str, CrossingValue]:
        """One call of a segment."""
        program, tree = self.program, self.program.tree
        segment = program.segments[level]
        inputs = []
        for name in segment.inputs:
            source = values[name]
            # A value may come from any lower level, whose branches have more of this level's below.
            ratio = tree.branches[level] // tree.branches[source.crossing.level]
            inputs.append(source.slice(span.parents(ratio)))
        results = segment.module(span, *inputs)
        outputs = {
            name: CrossingValue(program.crossings[name], span, value)
            for name, value in zip(segment.outputs, results, strict=True)
        }
        self._keep(level, span, outputs)
        return outputs

    def _keep(self, level: int, span: Span, outputs: Mapping[str, CrossingValue]) -> None:
        """Keep the values of the branch that the walk leaves incomplete, if it is in the span."""
        if self.stop is None or level == self.program.tree.levels - 1:
            return
        branch, computed = divmod(self.stop, self.program.tree.leaves_below(level))
        if computed and branch == span.stop - 1:
            self.kept[level] = {name: value.branch(branch) for name, value in outputs.items()}


def _joined(pieces: Sequence[CrossingValue]) -> CrossingValue:
    """Values of neighbouring spans as one."""
    first = pieces[0]
    if len(pieces) == 1:
        return first
    span = Span(first.span.start, pieces[-1].span.stop)
    crossing = first.crossing
    values = [piece.value for piece in pieces]
    return CrossingValue(crossing, span, join(values, crossing.form, crossing.facts))
