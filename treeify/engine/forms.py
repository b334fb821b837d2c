"""The forms a value takes while a tree runs, and the conversions between them.

- *shared*: one value, the same for every branch (all before the first split, sizes, constants);
- *packed*: the branches of a span in one tensor, `[N, G*C, ...]` branch-major if dim 0 is the batch
  and there is a dim 1, else stacked to `[G, ...]`;
- *in the batch*: what the base model would make of `G*N` images, `[G*N, ...]` branch-major, in
  whichever dim grows with the batch; without such a dim stacked to `[G, ...]`. Whatever treats
  every image by itself runs unchanged in this form: attention, windows, reshapes;
- *per branch*: `Branches`, one value per branch of the span;
- *leaves*: what the whole tree returns, `[N, L, ...]`.

`facts` are a base value's `TensorFacts` throughout, in the value's own structure of tuples and
dicts, with None in the place of what is no tensor.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from treeify.tracing.facts import TensorFacts
from treeify.tree import Span


class Form(Enum):
    """How a value of several branches lies in memory."""

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
        picked = {key: pick(item, index) for key, item in value.items()}
        # One without branches stays what it is: it may be of another type.
        return value if all(picked[key] is value[key] for key in picked) else picked
    if isinstance(value, slice):
        return slice(*(pick(item, index) for item in (value.start, value.stop, value.step)))
    return value


def concat_dim(fact: TensorFacts, form: Form) -> int | None:
    """The dim along which a tensor's branches are concatenated; None if they are stacked."""
    if form is Form.BATCH:
        return fact.batch_dim
    return 1 if fact.branch_dim == 1 else None


def pack(branches: Branches, facts: Any, form: Form = Form.PACKED) -> Any:
    """Per branch -> packed, or in the batch."""

    def concat(fact: TensorFacts | None, *tensors: Any) -> Any:
        if fact is None:
            return tensors[0]
        dim = concat_dim(fact, form)
        return torch.stack(tensors) if dim is None else torch.cat(tensors, dim=dim)

    return tree_map(concat, facts, *branches)


def join(values: Sequence[Any], form: Form, facts: Any) -> Any:
    """Values in one form for neighbouring spans -> one value for all of them."""
    if form is Form.SHARED:
        return values[0]
    if form is Form.BRANCHES:
        return Branches(branch for value in values for branch in value)
    if form is Form.LEAVES:
        return tree_map(_join_leaves, *values)

    def concat(fact: TensorFacts | None, *tensors: Any) -> Any:
        return tensors[0] if fact is None else torch.cat(tensors, dim=concat_dim(fact, form) or 0)

    return tree_map(concat, facts, *values)


def _join_leaves(*outputs: Any) -> Any:
    first = outputs[0]
    return torch.cat(outputs, dim=min(1, first.ndim - 1)) if isinstance(first, Tensor) else first


def unpack(
    value: Any, facts: Any, count: int, form: Form = Form.PACKED, *, unbind: bool = True
) -> Branches:
    """Packed, or in the batch -> per branch; views, no copies.

    Branches that are stacked keep that dim, and so the form, unless `unbind`.
    """

    def tensors(fact: TensorFacts | None, tensor: Any) -> Any:
        if fact is None:
            return [tensor] * count
        dim = concat_dim(fact, form)
        if dim is None and unbind:
            return tensor.unbind(0)
        dim = dim or 0
        # Not `chunk`, which gives fewer pieces for a batch of no images, and which `torch.export`
        # does not follow where the number of images is not known.
        if count == 1:
            return [tensor]
        return torch.unflatten(tensor, dim, (count, tensor.shape[dim] // count)).unbind(dim)

    if isinstance(facts, TensorFacts):
        return Branches(tensors(facts, value))
    leaves, structure = tree_flatten(facts)
    columns = list(map(tensors, leaves, structure.flatten_up_to(value)))
    return Branches(
        tree_unflatten([column[index] for column in columns], structure) for index in range(count)
    )


def children(parents: Branches, span: Span, ratio: int) -> Branches:
    """Every branch of `span` with its parent's value, `ratio` siblings to a parent."""
    first = span.start // ratio
    return Branches(parents[branch // ratio - first] for branch in range(*span))


def read_once(span: Span, ratio: int, x: Tensor, facts: TensorFacts) -> tuple[int, Tensor]:
    """The input of an operation that computes all siblings from one copy of their parent's value.

    Returns:
        How many parents the returned tensor has, and the tensor. A span that cuts through
        siblings leaves parents with unequally many children; then each child gets its own copy.
    """
    parents = span.parents(ratio)
    # A grouped convolution needs as many outputs of every group.
    if parents.size > 1 and (span.start % ratio or span.stop % ratio):
        return span.size, pack(children(unpack(x, facts, parents.size), span, ratio), facts)
    return parents.size, x


class Convert(nn.Module):
    """Brings a value from the form and level of its operation to those its reader needs.

    Args:
        facts: of the base value.
        source: the form it is in.
        target: the form it is needed in: packed, in the batch or per branch.
        ratio: branches at the reader's level for each branch at the value's level.
    """

    def __init__(self, facts: Any, source: Form, target: Form, ratio: int) -> None:
        super().__init__()
        self.facts, self.source, self.target, self.ratio = facts, source, target, ratio
        # Between dim 1 and the batch one permutation does, without a tensor for each branch.
        self.permutes = ratio == 1 and {source, target} == {Form.PACKED, Form.BATCH}

    def forward(self, span: Span, value: Any) -> Any:
        """The value for every branch of `span`."""
        if self.permutes:
            return tree_map(
                lambda fact, tensor: self._permute(fact, tensor, span.size), self.facts, value
            )
        parents = span.parents(self.ratio)
        if self.source is Form.SHARED:
            branches = Branches([value] * span.size)
        else:
            if self.source is not Form.BRANCHES:
                value = unpack(value, self.facts, parents.size, self.source)
            branches = children(value, span, self.ratio)
        if self.target is Form.BRANCHES:
            return branches
        single = len(branches) == 1 and isinstance(self.facts, TensorFacts)
        if single and concat_dim(self.facts, self.target) is not None:
            return branches[0]  # it is packed already: no copy
        return pack(branches, self.facts, self.target)

    def _permute(self, fact: TensorFacts | None, value: Any, count: int) -> Any:
        """Move the branches of a tensor from dim 1 into the batch or back."""
        if fact is None:
            return value
        before, after = (concat_dim(fact, form) for form in (self.source, self.target))
        if before == after or (count == 1 and None not in (before, after)):
            return value
        if before == 1 and after == 0:
            return channels_to_batch(value, count)
        if before == 0 and after == 1:
            return batch_to_channels(value, count)
        return pack(unpack(value, fact, count, self.source), fact, self.target)

    def extra_repr(self) -> str:
        """The conversion, for printing a segment."""
        return f"{self.source.value} -> {self.target.value}, x{self.ratio}"


def channels_to_batch(x: Tensor, count: int) -> Tensor:
    """`[N, G*C, ...] -> [G*N, C, ...]`, images with channels last staying so."""
    parts = split_branches(x, count)
    # In channels last, `flatten` has to see the channels at the end, or it would lose that format.
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
    """Numbers that grow with the batch (`Facts.grows`), for the branches' images together."""

    def __init__(self, grows: Any) -> None:
        super().__init__()
        self.grows = grows

    def forward(self, span: Span, value: Any) -> Any:
        """The base model's number or numbers -> those for `G` times as many images."""
        return self._times(self.grows, value, span.size)

    def _times(self, grows: Any, value: Any, count: int) -> Any:
        if isinstance(grows, dict):
            return {key: self._times(inner, value[key], count) for key, inner in grows.items()}
        if isinstance(grows, tuple):
            pairs = zip(grows, value, strict=True)
            return tuple(self._times(inner, number, count) for inner, number in pairs)
        return value * count if grows else value


class Leaves(nn.Module):
    """Outputs of the last level, packed or in the batch -> `[N, L, K, ...]`, the leaf dim at 1."""

    def __init__(self, facts: Any, form: Form) -> None:
        super().__init__()
        self.facts, self.form = facts, form

    def forward(self, span: Span, value: Any) -> Any:
        """The value with the leaf dim at 1; a 0-d tensor of the base model becomes `[L]`."""

        def separate(fact: TensorFacts | None, tensor: Any) -> Any:
            if fact is None:
                return tensor
            dim = concat_dim(fact, self.form)
            if dim is None:
                return tensor.transpose(0, 1) if fact.shape else tensor
            leaves = torch.unflatten(tensor, dim, (span.size, tensor.shape[dim] // span.size))
            return leaves.movedim(dim, 1)

        return tree_map(separate, self.facts, value)


def split_branches(packed: Tensor, count: int) -> Tensor:
    """`[N, G*C, ...] -> [N, G, C, ...]`, a view."""
    # Not -1: that cannot be told for a batch of no images.
    return torch.unflatten(packed, 1, (count, packed.shape[1] // count))


def merge_branches(x: Tensor) -> Tensor:
    """`[N, G, C, ...] -> [N, G*C, ...]`."""
    return x.flatten(1, 2)
