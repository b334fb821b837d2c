"""Values between levels as flat lists of tensors, which is all that a file's inputs can be.

A crossing's value may be a tensor, or tensors and numbers in tuples and dicts, one for each branch.
Its layout tells which tensors there are, in which order, and what else stands between them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from treeify.engine.forms import Branches, Form, concat_dim, join
from treeify.engine.program import Crossing
from treeify.errors import ExportError
from treeify.tracing.facts import TensorFacts
from treeify.tree import Span

# The dim that grows with the batch, and how many times the images it holds; None if none does.
BatchDim = tuple[int, int] | None

# Two, since one image would be taken for a constant.
IMAGES = 2


@dataclass(frozen=True)
class Multiple:
    """A number that grows with the batch: so many times its images."""

    factor: int


@dataclass(frozen=True)
class Layout:
    """Where the tensors of a crossing's value are.

    Args:
        crossing: the value's form, level and facts.
        example: one branch's tensors, in order, for a batch of `images`.
        facts: theirs.
        structure: of the value of one branch, or of all together.
        rest: what stands in the structure at each place: None for the next tensor, else a constant,
            or a `Multiple` of the batch.
        images: how many there are in the example.
    """

    crossing: Crossing
    example: tuple[Tensor, ...]
    facts: tuple[TensorFacts, ...]
    structure: Any
    rest: tuple[Any, ...]
    images: int

    @property
    def form(self) -> Form:
        """The form of the value."""
        return self.crossing.form

    def tensors(self, value: Any) -> list[Tensor]:
        """The tensors of a value for a span, branch by branch where it is held so."""
        parts = value if self.form is Form.BRANCHES else (value,)
        return [
            leaf
            for part in parts
            for leaf, rest in zip(
                self.structure.flatten_up_to(_without_sizes(part)), self.rest, strict=True
            )
            if rest is None
        ]

    def value(self, tensors: Sequence[Tensor], branches: int, images: Any) -> Any:
        """The value of such tensors, of so many branches and for so many images."""
        remaining = iter(tensors)
        if self.form is Form.BRANCHES:
            return Branches(self._structured(remaining, images) for _ in range(branches))
        return self._structured(remaining, images)

    def _structured(self, tensors: Iterator[Tensor], images: Any) -> Any:
        leaves = [next(tensors) if rest is None else _constant(rest, images) for rest in self.rest]
        return tree_unflatten(leaves, self.structure)

    def examples(self, branches: int) -> list[Tensor]:
        """Tensors of so many branches."""
        if self.form is Form.SHARED:
            return list(self.example)
        if self.form is Form.BRANCHES:
            return [*self.example] * branches
        pairs = zip(self.example, self.facts, strict=True)
        return [join([tensor] * branches, self.form, fact) for tensor, fact in pairs]

    def batch_dims(self, branches: int) -> list[BatchDim]:
        """Per tensor of so many branches, the dim that grows with the batch and by how much."""
        dims: list[BatchDim] = []
        for tensor, fact in zip(self.example, self.facts, strict=True):
            dim = self.batch_dim(fact)
            if dim is None:
                dims.append(None)
                continue
            # In the batch, a dim holds the images of every branch.
            times = branches if self.form is Form.BATCH else 1
            dims.append((dim, times * tensor.shape[dim] // self.images))
        return dims * (branches if self.form is Form.BRANCHES else 1)

    def batch_dim(self, fact: TensorFacts) -> int | None:
        """The dim that grows with the batch, of a tensor in this form."""
        if fact.batch_dim is None:
            return None
        # Stacked tensors have one dim more before.
        stacked = self.form in (Form.PACKED, Form.BATCH) and concat_dim(fact, self.form) is None
        return fact.batch_dim + stacked


def layout_of(crossing: Crossing, small: Any, large: Any, images: int) -> Layout:
    """The layout of a value of one branch, seen for so many images and for one more.

    Raises:
        ExportError: a number in it depends on the batch in another way than by growing with it.
    """
    if crossing.form is Form.BRANCHES:
        ((small,), (large,)) = small, large
    facts, structure = tree_flatten(crossing.facts)
    values = (structure.flatten_up_to(_without_sizes(value)) for value in (small, large))
    rows = list(zip(facts, *values, strict=True))
    tensors = [(fact, value) for fact, value, _ in rows if fact is not None]
    return Layout(
        crossing,
        tuple(value.detach() for _, value in tensors),
        tuple(fact for fact, _ in tensors),
        structure,
        tuple(None if fact is not None else _rest(one, other, images) for fact, one, other in rows),
        images,
    )


def _without_sizes(value: Any) -> Any:
    """The value with sizes of tensors as plain tuples, which their facts are."""
    return tuple(value) if isinstance(value, torch.Size) else value


def _rest(small: Any, large: Any, images: int) -> Any:
    """What stands between tensors, from its values for two batches."""
    if isinstance(small, tuple | list):
        parts = [_rest(one, other, images) for one, other in zip(small, large, strict=True)]
        return (type(small), parts)
    if small == large:
        return (small,)
    if type(small) is int and small % images == 0 and large == small // images * (images + 1):
        return Multiple(small // images)
    raise ExportError(
        "a number that passes between levels depends on the batch, and does not grow with it.",
        expected=f"a constant, or a multiple of the {images} images",
        found=f"{small} and, for {images + 1} images, {large}",
        next_step="Split elsewhere: treeify splits lists the points.",
    )


def _constant(rest: Any, images: Any) -> Any:
    if isinstance(rest, Multiple):
        return rest.factor * images
    if len(rest) == 1:
        return rest[0]
    kind, parts = rest
    return kind([_constant(part, images) for part in parts])


def slice_branches(x: Tensor, dim: int, count: int, start: int, size: int) -> Tensor:
    """Some of the `count` branches that lie in a dim, `[.., G*C, ..] -> [.., size*C, ..]`."""
    apart = torch.unflatten(x, dim, (count, x.shape[dim] // count))
    return apart.narrow(dim, start, size).flatten(dim, dim + 1)


def join_branches(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Branches that lie in several tensors together in one."""
    return torch.cat(list(parts), dim)


@dataclass(frozen=True)
class Piece:
    """The tensors of a crossing's value for a span, as nodes of a step's graph."""

    span: Span
    nodes: tuple[fx.Node, ...]


@dataclass
class Pieces:
    """A crossing's value in a step: what was computed of it, in one call or several.

    Slices and joins are written only where a reader wants what no call gave.
    """

    layout: Layout
    graph: fx.Graph
    parts: list[Piece]
    _joined: dict[Span, tuple[fx.Node, ...]] = field(default_factory=dict)

    def slice(self, span: Span) -> tuple[fx.Node, ...]:
        """The nodes of the tensors for a span."""
        layout = self.layout
        if layout.form is Form.SHARED:
            return self.parts[0].nodes
        for part in self.parts:
            if part.span == span:
                return part.nodes
        if span in self._joined:  # for another reader
            return self._joined[span]
        pieces = [
            self._part(part, Span(max(span.start, part.span.start), min(span.stop, part.span.stop)))
            for part in self.parts
            if part.span.start < span.stop and span.start < part.span.stop
        ]
        if len(pieces) == 1:
            return pieces[0]
        if layout.form is Form.BRANCHES:
            return tuple(node for piece in pieces for node in piece)
        joined = tuple(
            self.graph.call_function(join_branches, (column, self._dim(fact)))
            for column, fact in zip(zip(*pieces, strict=True), layout.facts, strict=True)
        )
        self._joined[span] = joined
        return joined

    def _part(self, part: Piece, span: Span) -> tuple[fx.Node, ...]:
        if part.span == span:
            return part.nodes
        start, width = span.start - part.span.start, len(self.layout.example)
        if self.layout.form is Form.BRANCHES:
            return part.nodes[start * width : (start + span.size) * width]
        return tuple(
            self.graph.call_function(
                slice_branches, (node, self._dim(fact), part.span.size, start, span.size)
            )
            for node, fact in zip(part.nodes, self.layout.facts, strict=True)
        )

    def _dim(self, fact: TensorFacts) -> int:
        return concat_dim(fact, self.layout.form) or 0


def crossing_layouts(
    crossings: Mapping[str, Crossing],
    small: Mapping[str, Any],
    large: Mapping[str, Any],
    images: int,
) -> dict[str, Layout]:
    """The layouts of all crossings whose values for two batches are given, by their names."""
    return {name: layout_of(crossings[name], small[name], large[name], images) for name in small}
