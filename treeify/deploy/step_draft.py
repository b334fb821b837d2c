"""Writing a step: calls of the levels it computes, and what passes between them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from treeify.deploy.step import Kept, Key, Step, item, output_names
from treeify.deploy.values import BatchDim, Layout, Piece, Pieces, join_branches
from treeify.engine.forms import Form
from treeify.engine.program import LOOPED, OUTPUT, Program
from treeify.tree import Span, Tree

# How a step runs a level: its number and the branches it computes there -> packed or looped.
Choose = Callable[[int, Span], str]


class Source(Protocol):
    """Where a step's calls come from: the tree, its program, calls with weights of their own."""

    tree: Tree
    program: Program
    layouts: dict[str, Layout]
    output: Any

    def dense(self, level: int, span: Span) -> fx.GraphModule:
        """A level's call with weights of its own."""
        ...


def spans_between(tree: Tree, start: int, leaves: int) -> list[Span]:
    """Per level, the branches that are computed on the way from some leaves to more."""
    # Both ends rounded up: a branch that has a computed leaf is computed itself.
    return [
        Span(-(-start // below), -(-leaves // below))
        for below in map(tree.leaves_below, range(tree.levels))
    ]


@dataclass
class Draft:
    """A step being written."""

    plans: Source
    start: int
    leaves: int
    choose: Choose
    graph: fx.Graph = field(default_factory=fx.Graph)
    values: dict[str, Pieces] = field(default_factory=dict)
    calls: dict[str, Key] = field(default_factory=dict)
    # What it reads of earlier steps: the crossing's name and the branch.
    needs: list[tuple[str, int]] = field(default_factory=list)
    inputs: list[tuple[str, Tensor, BatchDim]] = field(default_factory=list)
    kept: list[tuple[Kept, fx.Node]] = field(default_factory=list)
    results: list[list[fx.Node]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.spans = spans_between(self.plans.tree, self.start, self.leaves)
        self.images = self.plans.program.crossings[self.plans.program.image]

    def write(self) -> None:
        """Write the calls of all levels."""
        for level, span in enumerate(self.spans):
            # In a tree that splits its images, the trunk computes nothing.
            if not span.size or not self.plans.program.segments[level].outputs:
                continue
            looped = span.size > 1 and self.choose(level, span) == LOOPED
            parts = [Span(each, each + 1) for each in range(*span)] if looped else [span]
            for part in parts:
                self._call(level, part)

    def _call(self, level: int, span: Span) -> None:
        plans, segment = self.plans, self.plans.program.segments[level]
        arguments: list[fx.Node] = []
        for name in segment.inputs:
            layout = plans.layouts[name]
            ratio = plans.tree.branches[level] // plans.tree.branches[layout.crossing.level]
            arguments += self._read(name, span.parents(ratio))
        target = f"level_{level}_branches_{span.start}_{span.stop - 1}"
        self.calls[target] = (level, span)
        called = self.graph.call_module(target, tuple(arguments))
        position = 0
        for name in segment.outputs:
            made = None if name == OUTPUT else plans.layouts[name]
            if made is None:
                width = sum(isinstance(leaf, Tensor) for leaf in tree_leaves(plans.output))
            else:
                branches = span.size if made.form is Form.BRANCHES else 1
                width = len(made.example) * branches
            nodes = tuple(
                self.graph.call_function(item, (called, position + index)) for index in range(width)
            )
            position += width
            if made is None:
                self.results.append(list(nodes))
            else:
                pieces = self.values.setdefault(name, Pieces(made, self.graph, []))
                pieces.parts.append(Piece(span, nodes))

    def _read(self, name: str, span: Span) -> tuple[fx.Node, ...]:
        """The value of a crossing for a span; what no call of this step gives is an input."""
        layout = self.plans.layouts[name]
        pieces = self.values.setdefault(name, Pieces(layout, self.graph, []))
        there = {branch for piece in pieces.parts for branch in range(*piece.span)}
        if layout.form is Form.SHARED:
            missing = [] if pieces.parts else [0]
        else:
            missing = [branch for branch in range(*span) if branch not in there]
        for branch in missing:
            self.needs.append((name, branch))
            pieces.parts.append(Piece(Span(branch, branch + 1), tuple(self._inputs(name, branch))))
        pieces.parts.sort(key=lambda piece: piece.span)
        return pieces.slice(span)

    def _inputs(self, name: str, branch: int) -> list[fx.Node]:
        return [self._placeholder(kept) for kept in self.plans_kept(name, branch)]

    def _placeholder(self, kept: Kept) -> fx.Node:
        """One more input, after those there are: arguments come first in a graph."""
        self.inputs.append((kept.name, kept.example, kept.batch_dim))
        last = next((n for n in reversed(self.graph.nodes) if n.op == "placeholder"), None)
        at = self.graph._root if last is None else last
        with self.graph.inserting_after(at):
            return self.graph.placeholder(kept.name)

    def receive(self, name: str, span: Span) -> None:
        """Let several branches of a value come from outside together."""
        layout = self.plans.layouts[name]
        branches = 1 if layout.form is Form.SHARED else span.size
        rows = zip(layout.examples(branches), layout.batch_dims(branches), strict=True)
        nodes = []
        for index, (example, dim) in enumerate(rows):
            nodes.append(self._placeholder(Kept(f"{name}_{index}", example, dim)))
        self.values[name] = Pieces(layout, self.graph, [Piece(span, tuple(nodes))])

    def keep_all(self, name: str, span: Span) -> None:
        """Give a value of several branches out, together."""
        layout = self.plans.layouts[name]
        for index, node in enumerate(self.values[name].slice(span)):
            self.kept.append((Kept(f"out_{name}_{index}", layout.example[0], None), node))

    def plans_kept(self, name: str, branch: int) -> list[Kept]:
        """The tensors of a crossing's branch, under the names that steps give them."""
        plans = self.plans
        layout = plans.layouts[name]
        dims = layout.batch_dims(1)
        if name == plans.program.image:
            return [Kept("images", layout.example[0], dims[0])]
        several = len(layout.example) > 1
        return [
            Kept(f"kept_{name}_{branch}" + (f"_{index}" if several else ""), example, dim)
            for index, (example, dim) in enumerate(zip(layout.examples(1), dims, strict=True))
        ]

    def keep(self, name: str, branch: int) -> None:
        """Give a value to later steps."""
        described = self.plans_kept(name, branch)
        names = {kept.name for kept, _ in self.kept}
        if all(kept.name in names for kept in described):
            return
        nodes = self.values[name].slice(Span(branch, branch + 1))
        self.kept += zip(described, nodes, strict=True)

    def step(self) -> Step:
        """The step as written."""
        columns = list(zip(*self.results, strict=True))
        tensors = [leaf for leaf in tree_leaves(self.plans.output) if isinstance(leaf, Tensor)]
        tensors = tensors if columns else []  # a level alone, to be measured
        leaves = []
        for column, tensor in zip(columns, tensors, strict=True):
            dim = min(1, tensor.ndim - 1)
            joined = self.graph.call_function(join_branches, (column, dim))
            leaves.append(column[0] if len(column) == 1 else joined)
        names = output_names(len(tensors))
        self.graph.output((*leaves, *(node for _, node in self.kept)))
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        self.graph.lint()
        root = {target: self.plans.dense(*call) for target, call in self.calls.items()}
        run = fx.GraphModule(root, self.graph, f"Step{self.start}To{self.leaves}")
        return Step(
            self.start,
            self.leaves,
            tuple(name for name, *_ in self.inputs),
            (*names, *(kept.name for kept, _ in self.kept)),
            run,
            tuple(kept for kept, _ in self.kept),
            tuple(example for _, example, _ in self.inputs),
            tuple(dim for *_, dim in self.inputs),
            self.calls,
        )
