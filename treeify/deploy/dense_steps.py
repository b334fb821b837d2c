"""An ensemble as a list of plain modules: each computes what one size needs beyond the one before.

A step from `n` to `m` leaves is a function of the images and of values that earlier steps kept.
Every branch's weights belong to exactly one step.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from treeify.arguments import require_integer, require_iterable
from treeify.conversion.ensemble import HierarchicalEnsemble, require_ensemble
from treeify.deploy.dense import Template, template
from treeify.deploy.level_call import LevelCall
from treeify.deploy.values import IMAGES, Layout, Piece, Pieces, crossing_layouts, join_branches
from treeify.engine.forms import Form
from treeify.engine.program import LOOPED, OUTPUT, PACKED, CrossingValue, Program, Walk
from treeify.errors import ExportError, LeafError
from treeify.tree import Span

# How a step runs a level: its number and the branches it computes there -> packed or looped.
Choose = Callable[[int, Span], str]
# A template's level and span; with one branch, the first stands for any.
Key = tuple[int, Span]


@dataclass(frozen=True)
class Kept:
    """A tensor that one step gives and later ones read.

    Args:
        name: unique over all steps.
        example: such a tensor, for two images.
        batch_dim: the dim that grows with the batch, and how many times the images; None if none.
    """

    name: str
    example: Tensor
    batch_dim: tuple[int, int] | None


class Step(nn.Module):
    """Computes leaves from `start` to `leaves`: tensors in, tensors out.

    Args:
        start: leaves that earlier steps computed.
        leaves: leaves that are computed after this step.
        inputs: names of its arguments; `images`, or what an earlier step kept.
        outputs: names of its results: the new leaves' outputs, `[N, leaves - start, K]` each, then
            what later steps read.
        run: the graph. It calls one module for each level, or for each branch where a level is
            looped, which hold weights of their own.
        kept: what it gives to later steps.
        examples: arguments for a batch of two images.
        batch_dims: per argument the dim that grows with the batch, and how many times the images.
        calls: per module that `run` calls, the level and the branches it computes.
    """

    def __init__(
        self,
        start: int,
        leaves: int,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        run: fx.GraphModule,
        kept: tuple[Kept, ...],
        examples: tuple[Tensor, ...],
        batch_dims: tuple[tuple[int, int] | None, ...],
        calls: dict[str, Key],
    ) -> None:
        super().__init__()
        self.start, self.leaves, self.inputs, self.outputs = start, leaves, inputs, outputs
        self.run, self.kept, self.calls = run, kept, calls
        self.examples, self.batch_dims = examples, batch_dims

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors named by `inputs` -> those named by `outputs`."""
        results: tuple[Tensor, ...] = self.run(*tensors)
        return results

    def extra_repr(self) -> str:
        """From how many leaves to how many, and of what."""
        return f"{self.start} -> {self.leaves} leaves, of {', '.join(self.inputs)}"


def steps(
    hne: HierarchicalEnsemble,
    sizes: Iterable[int] | None = None,
    *,
    batch: int | None = None,
    input_size: tuple[int, int] | None = None,
) -> list[Step]:
    """An ensemble as plain modules, one for each size; together they are as large as it is.

    Each has dense weights of its own with batch norms folded in, changes none of its inputs, and
    can be traced by `torch.export`. Levels are packed.

    Args:
        hne: the ensemble. Not modified.
        sizes: increasing nested sizes at which a step ends; all of them if not given.
        batch: how many images there will be; any number if not given.
        input_size: height and width of images, instead of those it was converted for.

    Returns:
        The steps, in the order in which they run; on the CPU, in float32.

    Raises:
        LeafError: a size is no nested one, or sizes do not increase.
        ExportError: the model cannot be exported.
    """
    plans = StepPlans(hne, batch=batch, input_size=input_size)
    return plans.steps(plans.check_sizes(sizes))


class StepPlans:
    """Makes steps; what was exported for one of them serves the others.

    The arguments are those of `steps`.
    """

    def __init__(
        self,
        hne: HierarchicalEnsemble,
        *,
        batch: int | None = None,
        input_size: tuple[int, int] | None = None,
    ) -> None:
        require_ensemble(hne)
        self.dynamic = batch is None
        self.hne = _plain(hne)
        self.tree = self.hne.tree
        self.program: Program = self.hne.evaluation_program
        shape = self.hne.example if input_size is None else (self.hne.example[0], *input_size)
        self.image_shape = tuple(shape)
        self.images = IMAGES if batch is None else require_batch(batch)
        small, large = (self._record(count) for count in (self.images, self.images + 1))
        self.output = small.pop(OUTPUT)
        large.pop(OUTPUT, None)
        self.layouts = crossing_layouts(self.program.crossings, small, large, self.images)
        self.packed = self.hne.packed_tensors
        self._templates: dict[Key, Template] = {}

    def check_sizes(self, sizes: Iterable[int] | None) -> tuple[int, ...]:
        """Sizes where steps can end, increasing; LeafError for others."""
        nested = self.tree.nested_sizes
        if sizes is None:
            return nested
        require_iterable("sizes", sizes, "increasing nested sizes", error=LeafError)
        chosen = tuple(sizes)
        for size in chosen:
            self.tree.check_size(size)
            if size not in nested:
                raise LeafError(
                    f"no step ends at {size} leaves.",
                    expected=f"nested sizes, of {', '.join(map(str, nested))}",
                    next_step=f"Any size in between is answered by the next smaller one.",
                )
        if not chosen or any(one >= other for one, other in pairwise(chosen)):
            raise LeafError(
                "sizes do not increase.", expected="e.g. 1,2,4", found=", ".join(map(str, chosen))
            )
        return chosen

    @torch.no_grad()
    def _record(self, images: int) -> dict[str, Any]:
        """The values of the first leaf's branches for so many images."""
        x = torch.rand(images, *self.image_shape, generator=torch.Generator().manual_seed(0))
        walk = Walk(self.program, (PACKED,) * self.tree.levels)
        values: dict[str, CrossingValue] = self.program.start(x)
        for level in range(self.tree.levels):
            values |= walk.call(level, Span(0, 1), values)
        return {name: value.value for name, value in values.items()}

    def template(self, key: Key) -> Template:
        """The graph of a level's call, exported when first asked for."""
        if key not in self._templates:
            self._templates[key] = template(self.level_call(key), dynamic=self.dynamic)
        return self._templates[key]

    def level_call(self, key: Key) -> LevelCall:
        """A level's call for a span."""
        level, span = key
        return LevelCall(
            self.program.segments[level], span, self.tree, self.layouts, self.packed
        )

    def dense(self, level: int, span: Span) -> fx.GraphModule:
        """A level's call with weights of its own."""
        return self.template(key_of(level, span)).instantiate(self.packed_from(level, span))

    def packed_from(self, level: int, span: Span) -> dict[str, Tensor]:
        """The packed tensors, rolled so that a single branch's own are the first."""
        if span.size > 1 or not span.start:
            return self.packed
        rolled = {}
        for key, tensor in self.packed.items():
            below = self.hne.level_of(key)
            if below <= level:
                branches = self.tree.branches[below]
                index = span.start // (self.tree.branches[level] // branches)
                tensor = tensor.roll(-index * (tensor.shape[0] // branches), 0)  # noqa: PLW2901
            rolled[key] = tensor
        return rolled

    def steps(self, sizes: Sequence[int], choose: Choose = lambda level, span: PACKED) -> list[Step]:
        """Steps that end at increasing nested sizes, each level run as chosen."""
        drafts = [
            _Draft(self, start, size, choose) for start, size in pairwise((0, *sizes))
        ]
        for draft in drafts:
            draft.write()
        for index, draft in enumerate(drafts):
            for name, branch in draft.needs:
                maker = _maker(drafts[:index], self.layouts[name], branch)
                if maker is not None:
                    maker.keep(name, branch)
        return [draft.step() for draft in drafts]

    def level_step(self, level: int, span: Span, execution: str) -> Step:
        """A step of one level alone, to measure it: what it reads comes from outside."""
        draft = _Draft(self, 0, self.tree.leaves, lambda level, span: execution)
        draft.spans = [Span(0, 0)] * self.tree.levels
        draft.spans[level] = span
        segment = self.program.segments[level]
        for name in segment.inputs:
            layout = self.layouts[name]
            branches = self.tree.branches[layout.crossing.level]
            draft.receive(name, span.parents(self.tree.branches[level] // branches))
        draft.write()
        for name in segment.outputs:
            if name != OUTPUT:
                draft.keep_all(name, span)
        return draft.step()


def require_batch(batch: int) -> int:
    """A number of images; InputError if it is none."""
    require_integer("batch", batch, 1, 2**16)
    return batch


def key_of(level: int, span: Span) -> Key:
    """Which template a call has."""
    return (level, Span(0, 1) if span.size == 1 else span)


def _plain(hne: HierarchicalEnsemble) -> HierarchicalEnsemble:
    """The ensemble in evaluation mode, in float32 on the CPU: itself, or a copy."""
    floating = [tensor for tensor in hne.state_dict().values() if tensor.is_floating_point()]
    on_cpu = all(tensor.device.type == "cpu" for tensor in hne.state_dict().values())
    if on_cpu and all(tensor.dtype == torch.float32 for tensor in floating) and not hne.training:
        return hne
    return copy.deepcopy(hne).cpu().float().eval()


def _maker(drafts: Sequence["_Draft"], layout: Layout, branch: int) -> "_Draft | None":
    """The step that computes a value last before it is needed; None for the images."""
    for draft in reversed(drafts):
        span = draft.spans[layout.crossing.level]
        shared = layout.form is Form.SHARED and span.size > 0
        if layout.crossing is not draft.images and (shared or span.start <= branch < span.stop):
            return draft
    return None


@dataclass
class _Draft:
    """A step being written."""

    plans: StepPlans
    start: int
    leaves: int
    choose: Choose
    graph: fx.Graph = field(default_factory=fx.Graph)
    values: dict[str, Pieces] = field(default_factory=dict)
    calls: dict[str, Key] = field(default_factory=dict)
    # What it reads of earlier steps: the crossing's name and the branch.
    needs: list[tuple[str, int]] = field(default_factory=list)
    inputs: list[tuple[str, Tensor, Any]] = field(default_factory=list)
    kept: list[tuple[Kept, fx.Node]] = field(default_factory=list)
    results: list[list[fx.Node]] = field(default_factory=list)

    def __post_init__(self) -> None:
        tree = self.plans.tree
        # Both ends rounded up: a branch that has a computed leaf is computed itself.
        self.spans = [
            Span(-(-self.start // below), -(-self.leaves // below))
            for below in map(tree.leaves_below, range(tree.levels))
        ]
        self.images = self.plans.program.crossings[self.plans.program.image]

    def write(self) -> None:
        """Write the calls of all levels."""
        for level, span in enumerate(self.spans):
            if not span.size:
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
            layout = None if name == OUTPUT else plans.layouts[name]
            if layout is None:
                width = sum(isinstance(leaf, Tensor) for leaf in tree_leaves(plans.output))
            else:
                branches = span.size if layout.form is Form.BRANCHES else 1
                width = len(layout.example) * branches
            nodes = tuple(
                self.graph.call_function(item, (called, position + index)) for index in range(width)
            )
            position += width
            if layout is None:
                self.results.append(list(nodes))
            else:
                pieces = self.values.setdefault(name, Pieces(layout, self.graph, []))
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


def output_names(count: int) -> tuple[str, ...]:
    """Names of the leaves' outputs."""
    return ("logits",) if count == 1 else tuple(f"logits_{index}" for index in range(count))


def item(values: tuple[Tensor, ...], index: int) -> Tensor:
    """One result of a level's call."""
    return values[index]
