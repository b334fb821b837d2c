"""The forms a value takes while a tree runs, and the steps between them.

- *shared*: one value, the same for every branch (all before the first split, sizes, constants);
- *packed*: the branches of a span in one tensor, `[N, G*C, ...]` branch-major if dim 0 is the batch
  and there is a dim 1, else stacked to `[G, ...]`;
- *per branch*: `Branches`, one value per branch of the span;
- *leaves*: what the whole tree returns, `[N, L, ...]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from treeify.trace import TensorFacts
from treeify.tree import Span


class Form(Enum):
    """How a value is held."""

    SHARED = "shared"
    PACKED = "packed"
    BRANCHES = "per branch"
    LEAVES = "leaves"


class Branches(tuple[Any, ...]):
    """One value per branch of a span."""

    __slots__ = ()


def pick(value: Any, index: int) -> Any:
    """An argument as branch `index` of a span sees it."""
    if isinstance(value, Branches):
        return value[index]
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        items = [pick(item, index) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: pick(item, index) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(pick(item, index) for item in (value.start, value.stop, value.step)))
    return value


def pack(branches: Branches, known: Any) -> Any:
    """Per branch -> packed.

    Args:
        branches: one value per branch.
        known: the base value's `TensorFacts`, in the value's own structure.
    """

    def join(fact: TensorFacts | None, *parts: Any) -> Any:
        if fact is None:
            return parts[0]
        return torch.cat(parts, dim=1) if fact.folds else torch.stack(parts)

    return tree_map(join, known, *branches)


def join(values: Sequence[Any], form: Form, known: Any) -> Any:
    """Values in one form for neighbouring spans -> one value for all of them."""
    if form is Form.SHARED:
        return values[0]
    if form is Form.BRANCHES:
        return Branches(branch for value in values for branch in value)

    if form is Form.LEAVES:
        return tree_map(_join_leaves, *values)

    def cat(fact: TensorFacts | None, *parts: Any) -> Any:
        return parts[0] if fact is None else torch.cat(parts, dim=int(fact.folds))

    return tree_map(cat, known, *values)


def _join_leaves(*parts: Any) -> Any:
    first = parts[0]
    return torch.cat(parts, dim=min(1, first.ndim - 1)) if isinstance(first, Tensor) else first


def unpack(value: Any, known: Any, count: int) -> Branches:
    """Packed -> per branch; views, no copies."""
    if isinstance(known, TensorFacts):
        return Branches(value.chunk(count, dim=1) if known.folds else value.unbind(0))

    def piece(fact: TensorFacts | None, whole: Any, index: int) -> Any:
        if fact is None:
            return whole
        return whole.chunk(count, dim=1)[index] if fact.folds else whole[index]

    return Branches(
        tree_map(lambda fact, whole, i=index: piece(fact, whole, i), known, value)
        for index in range(count)
    )


def children(parents: Branches, span: Span, ratio: int) -> Branches:
    """Every branch of `span` with its parent's value, `ratio` siblings to a parent."""
    first = span.start // ratio
    return Branches(parents[branch // ratio - first] for branch in range(*span))


def read_once(span: Span, ratio: int, x: Tensor, known: TensorFacts) -> tuple[int, Tensor]:
    """The input of an operation that computes all siblings from one copy of their parent's value.

    Args:
        span: the branches to compute.
        ratio: siblings per parent.
        x: the parents' values, packed.
        known: facts of the value.

    Returns:
        How many parents the returned tensor holds, and the tensor. A span that cuts through
        siblings leaves parents with unequally many children; then each child gets its own copy.
    """
    parents = span.parents(ratio)
    if parents.size > 1 and (span.start % ratio or span.stop % ratio):
        return span.size, pack(children(unpack(x, known, parents.size), span, ratio), known)
    return parents.size, x


class Convert(nn.Module):
    """Brings a value from the form and level it was made in to those its reader wants.

    Args:
        known: the base value's `TensorFacts`, in the value's own structure.
        source: the form it is in.
        target: the form it is wanted in, packed or per branch.
        ratio: branches at the reader's level for each branch at the value's level.
    """

    def __init__(self, known: Any, source: Form, target: Form, ratio: int) -> None:
        super().__init__()
        self.known, self.source, self.target, self.ratio = known, source, target, ratio

    def forward(self, span: Span, value: Any) -> Any:
        """The value for every branch of `span`."""
        parents = span.parents(self.ratio)
        if self.source is Form.SHARED:
            branches = Branches([value] * span.size)
        else:
            above = value
            if self.source is Form.PACKED:
                above = unpack(value, self.known, parents.size)
            branches = children(above, span, self.ratio)
        return pack(branches, self.known) if self.target is Form.PACKED else branches

    def extra_repr(self) -> str:
        """The step, for printing a segment."""
        return f"{self.source.value} -> {self.target.value}, x{self.ratio}"


class Leaves(nn.Module):
    """Packed outputs of the last level -> the leaf dim: `[N, L*K, ...] -> [N, L, K, ...]`."""

    def __init__(self, known: Any) -> None:
        super().__init__()
        self.known = known

    def forward(self, span: Span, value: Any) -> Any:
        """The value with the leaf dim at 1; a 0-d tensor of the base model becomes `[L]`."""

        def separate(fact: TensorFacts | None, packed: Any) -> Any:
            if fact is None:
                return packed
            if fact.folds:
                return unfold(packed, span.size)
            return packed.transpose(0, 1) if fact.shape else packed

        return tree_map(separate, self.known, value)


def unfold(packed: Tensor, count: int) -> Tensor:
    """`[N, G*C, ...] -> [N, G, C, ...]`, a view."""
    # Not -1: that cannot be told for a batch of no images.
    return torch.unflatten(packed, 1, (count, packed.shape[1] // count))


def refold(unfolded: Tensor) -> Tensor:
    """`[N, G, C, ...] -> [N, G*C, ...]`."""
    return unfolded.flatten(1, 2)
