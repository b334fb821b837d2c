"""The forms a value takes while a tree runs, and the steps between them.

- *shared*: one value, the same for every branch (all before the first split, sizes, constants);
- *packed*: the branches of a span in one tensor, `[N, G*C, ...]` branch-major if dim 0 is the batch
  and there is a dim 1, else stacked to `[G, ...]`;
- *in the batch*: what the base model would make of `G*N` images, `[G*N, ...]` branch-major, in
  whichever dim grows with the batch; without such a dim stacked to `[G, ...]`. Whatever treats
  every image by itself runs so as it stands: attention, windows, reshapes;
- *per branch*: `Branches`, one value per branch of the span;
- *leaves*: what the whole tree returns, `[N, L, ...]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from treeify.tracing.facts import TensorFacts
from treeify.tree import Span


class Form(Enum):
    """How a value is held."""

    SHARED = "shared"
    PACKED = "packed"
    BATCH = "in the batch"
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


def place(fact: TensorFacts, form: Form) -> int | None:
    """The dim along which a tensor's branches are concatenated; None if they are stacked."""
    if form is Form.BATCH:
        return fact.batch_dim
    return 1 if fact.branch_dim == 1 else None


def pack(branches: Branches, known: Any, form: Form = Form.PACKED) -> Any:
    """Per branch -> packed, or in the batch.

    Args:
        branches: one value per branch.
        known: the base value's `TensorFacts`, in the value's own structure.
        form: the form wanted.
    """

    def join(fact: TensorFacts | None, *parts: Any) -> Any:
        if fact is None:
            return parts[0]
        dim = place(fact, form)
        return torch.stack(parts) if dim is None else torch.cat(parts, dim=dim)

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
        return parts[0] if fact is None else torch.cat(parts, dim=place(fact, form) or 0)

    return tree_map(cat, known, *values)


def _join_leaves(*parts: Any) -> Any:
    first = parts[0]
    return torch.cat(parts, dim=min(1, first.ndim - 1)) if isinstance(first, Tensor) else first


def unpack(value: Any, known: Any, count: int, form: Form = Form.PACKED) -> Branches:
    """Packed, or in the batch -> per branch; views, no copies."""

    def pieces(whole: Tensor, dim: int | None) -> Sequence[Tensor]:
        return whole.unbind(0) if dim is None else _chunks(whole, count, dim)

    return _by_branch(value, known, count, form, pieces)


def cut(value: Any, known: Any, count: int, form: Form) -> Branches:
    """Packed, or in the batch -> the same for each branch alone; views, no copies."""

    def pieces(whole: Tensor, dim: int | None) -> Sequence[Tensor]:
        return _chunks(whole, count, dim or 0)

    return _by_branch(value, known, count, form, pieces)


def _by_branch(
    value: Any,
    known: Any,
    count: int,
    form: Form,
    pieces: Callable[[Tensor, int | None], Sequence[Tensor]],
) -> Branches:
    """The branches' values.

    Args:
        value: of all branches.
        known: the base value's `TensorFacts`, in the value's own structure.
        count: how many branches.
        form: the form the value is in.
        pieces: parts a tensor along the dim of its branches, or where they are stacked.
    """

    def parted(fact: TensorFacts | None, whole: Any) -> Sequence[Any]:
        return [whole] * count if fact is None else pieces(whole, place(fact, form))

    if isinstance(known, TensorFacts):
        return Branches(parted(known, value))
    facts, structure = tree_flatten(known)
    wholes = structure.flatten_up_to(value)
    columns = [parted(fact, whole) for fact, whole in zip(facts, wholes, strict=True)]
    return Branches(
        tree_unflatten([column[index] for column in columns], structure) for index in range(count)
    )


def _chunks(whole: Tensor, count: int, dim: int) -> Sequence[Tensor]:
    # `chunk` gives fewer pieces for a batch of no images.
    return whole.chunk(count, dim) if whole.shape[dim] else [whole] * count


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
        target: the form it is wanted in: packed, in the batch or per branch.
        ratio: branches at the reader's level for each branch at the value's level.
    """

    def __init__(self, known: Any, source: Form, target: Form, ratio: int) -> None:
        super().__init__()
        self.known, self.source, self.target, self.ratio = known, source, target, ratio
        self.swaps = ratio == 1 and {source, target} == {Form.PACKED, Form.BATCH}

    def forward(self, span: Span, value: Any) -> Any:
        """The value for every branch of `span`."""
        if self.swaps:
            return tree_map(lambda fact, own: self._swap(fact, own, span.size), self.known, value)
        parents = span.parents(self.ratio)
        if self.source is Form.SHARED:
            branches = Branches([value] * span.size)
        else:
            above = value
            if self.source is not Form.BRANCHES:
                above = unpack(value, self.known, parents.size, self.source)
            branches = children(above, span, self.ratio)
        return branches if self.target is Form.BRANCHES else self._packed(branches)

    def _packed(self, branches: Branches) -> Any:
        one = len(branches) == 1 and isinstance(self.known, TensorFacts)
        if one and place(self.known, self.target) is not None:
            return branches[0]
        return pack(branches, self.known, self.target)

    def _swap(self, fact: TensorFacts | None, value: Any, count: int) -> Any:
        """From dim 1 into the batch or back."""
        before, after = (
            None if fact is None else place(fact, form) for form in (self.source, self.target)
        )
        if before == after or (count == 1 and None not in (before, after)):
            return value
        if before == 1 and after == 0:
            return channels_to_batch(value, count)
        if before == 0 and after == 1:
            return batch_to_channels(value, count)
        assert fact is not None
        return pack(unpack(value, fact, count, self.source), fact, self.target)

    def extra_repr(self) -> str:
        """The step, for printing a segment."""
        return f"{self.source.value} -> {self.target.value}, x{self.ratio}"


def channels_to_batch(x: Tensor, count: int) -> Tensor:
    """`[N, G*C, ...] -> [G*N, C, ...]`, images with channels last staying so."""
    parts = split_branches(x, count)
    if not _has_channels_last(x):
        return parts.transpose(0, 1).flatten(0, 1)
    return parts.permute(1, 0, 3, 4, 2).flatten(0, 1).permute(0, 3, 1, 2)


def batch_to_channels(x: Tensor, count: int) -> Tensor:
    """`[G*N, C, ...] -> [N, G*C, ...]`, images with channels last staying so."""
    parts = torch.unflatten(x, 0, (count, x.shape[0] // count))
    if not _has_channels_last(x):
        return parts.transpose(0, 1).flatten(1, 2)
    return parts.permute(1, 3, 4, 0, 2).flatten(3, 4).permute(0, 3, 1, 2)


def _has_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.stride(1) == 1 and x.shape[1] > 1 and not x.is_contiguous()


class Multiply(nn.Module):
    """Numbers that grow with the batch, for the branches' images together.

    Args:
        grows: the number's `Facts.grows`.
    """

    def __init__(self, grows: Any) -> None:
        super().__init__()
        self.grows = grows

    def forward(self, span: Span, value: Any) -> Any:
        """The base model's number or numbers -> those for `G` times as many images."""
        return self._times(self.grows, value, span.size)

    def _times(self, grows: Any, value: Any, count: int) -> Any:
        if isinstance(grows, dict):
            return {key: self._times(own, value[key], count) for key, own in grows.items()}
        if isinstance(grows, tuple):
            pairs = zip(grows, value, strict=True)
            return tuple(self._times(own, part, count) for own, part in pairs)
        return value * count if grows else value


class Leaves(nn.Module):
    """Outputs of the last level -> the leaf dim at 1: `[N, L*K, ...] -> [N, L, K, ...]`.

    Args:
        known: the base value's `TensorFacts`, in the value's own structure.
        form: the form the value is in, packed or in the batch.
    """

    def __init__(self, known: Any, form: Form) -> None:
        super().__init__()
        self.known, self.form = known, form

    def forward(self, span: Span, value: Any) -> Any:
        """The value with the leaf dim at 1; a 0-d tensor of the base model becomes `[L]`."""

        def separate(fact: TensorFacts | None, packed: Any) -> Any:
            if fact is None:
                return packed
            dim = place(fact, self.form)
            if dim is None:
                return packed.transpose(0, 1) if fact.shape else packed
            parts = torch.unflatten(packed, dim, (span.size, packed.shape[dim] // span.size))
            return parts.movedim(dim, 1)

        return tree_map(separate, self.known, value)


def split_branches(packed: Tensor, count: int) -> Tensor:
    """`[N, G*C, ...] -> [N, G, C, ...]`, a view."""
    # Not -1: that cannot be told for a batch of no images.
    return torch.unflatten(packed, 1, (count, packed.shape[1] // count))


def merge_branches(x: Tensor) -> Tensor:
    """`[N, G, C, ...] -> [N, G*C, ...]`."""
    return x.flatten(1, 2)
