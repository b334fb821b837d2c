"""Parts of tensors, read, replaced or joined, that leave the batch alone."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from treeify.rules.call import Call, Unpackable
from treeify.rules.elementwise import require_aligned
from treeify.rules.image_by_image import dims_of, run_along, to_batch
from treeify.rules.operations.direct import Direct, ToBatch
from treeify.rules.operations.packed import ConcatenateChannels
from treeify.rules.operations.shapes import Element
from treeify.rules.table import batch_rule, rule
from treeify.tracing.facts import TensorFacts, facts
from treeify.tracing.functionalize import set_item

_CUTS = (torch.chunk, "chunk", torch.split, "split")
_EVERYTHING = slice(None)

rule(*_CUTS, torch.narrow, "narrow", torch.unbind, "unbind", pure=True)(to_batch)
batch_rule(*_CUTS, torch.tensor_split, pure=True)(run_along(2, default=0))
batch_rule(torch.unbind, "unbind", pure=True)(run_along(1, default=0))
batch_rule(torch.narrow, "narrow", torch.select, "select", "unfold", pure=True)(run_along(1))


@batch_rule(torch.index_select, "index_select", pure=True)
def run_index_select(call: Call) -> Direct:
    """Parts along a dim that is given first, at the same places for all branches."""
    if call.argument(2, "index") in call.varying:
        raise Unpackable("each branch has an index of its own")
    operand = call.batch_facts()
    if operand.batch_dim in dims_of(call, len(operand.shape), 1):
        raise Unpackable("it works along the batch")
    return Direct(call.target)


@rule(operator.getitem, pure=True)
def pack_getitem(call: Call) -> Element | ToBatch:
    """Elements of what another operation returned, and slices that leave the batch alone."""
    source, index = call.node.args
    if call.tensor(source) is None:
        return Element()
    call.require_channels()
    first = index[0] if isinstance(index, tuple) and index else index
    if not (first is Ellipsis or first == _EVERYTHING):
        raise Unpackable("it indexes the batch")
    return ToBatch(operator.getitem)


@batch_rule(operator.getitem, pure=True)
def run_getitem(call: Call) -> nn.Module:
    """Elements of what another operation returned, and slices that leave the batch alone."""
    source, index = call.node.args
    operand = call.tensor(source)
    if operand is None:
        return Element()
    if operand.batch_dim is None:
        raise Unpackable("its input has no batch dim")
    indices = list(index) if isinstance(index, tuple) else [index]
    nodes = [item for item in indices if isinstance(item, fx.Node)]
    if any(item in call.varying and facts(item).tensors for item in nodes):
        raise Unpackable("its index differs from branch to branch")
    if _by_dim(indices, len(operand.shape))[operand.batch_dim] != _EVERYTHING:
        raise Unpackable("it indexes the batch")
    return Direct(operator.getitem)


@batch_rule(set_item)
def run_set_item(call: Call) -> Direct:
    """Parts of every image replaced."""
    _, index, value = call.node.args
    operand = call.batch_facts()
    assert operand.batch_dim is not None
    indices = list(index) if isinstance(index, tuple) else [index]
    if not all(item is Ellipsis or type(item) in (int, slice) for item in indices):
        raise Unpackable("its index is not only numbers and slices")
    by_dim = _by_dim(indices, len(operand.shape))
    if by_dim[operand.batch_dim] != _EVERYTHING:
        raise Unpackable("it sets some images")
    replacement = call.tensor(value)
    if replacement is not None and replacement.batch_dim is None and value in call.varying:
        raise Unpackable("the new value differs from branch to branch")
    # A number as index drops its dim; the replacement broadcasts to the dims that remain.
    remaining = [dim for dim, item in enumerate(by_dim) if type(item) is slice]
    shape = tuple(operand.shape[dim] for dim in remaining)
    batch_dim = remaining.index(operand.batch_dim)
    require_aligned([replacement], TensorFacts(shape, batch_dim == 0, batch_dim))
    return Direct(set_item)


def _by_dim(indices: Sequence[Any], rank: int) -> list[Any]:
    """What each dim of the indexed tensor is indexed with."""
    ellipsis = rank - sum(item is not None and item is not Ellipsis for item in indices)
    by_dim: list[Any] = []
    for item in indices:
        if item is Ellipsis:
            by_dim += [_EVERYTHING] * ellipsis
        elif item is not None:  # which makes a new dim
            by_dim.append(item)
    return by_dim + [_EVERYTHING] * (rank - len(by_dim))


@rule(torch.cat, torch.concat, pure=True)
def pack_cat(call: Call) -> nn.Module:
    """Concatenation: of channels within every branch, of other dims as it stands."""
    call.require_channels()
    dim = call.argument(1, "dim", call.node.kwargs.get("axis", 0))
    if not isinstance(dim, int):
        raise Unpackable("its dim is not a constant")
    rank = len(call.facts.tensors[0].shape)
    return ConcatenateChannels() if dim % rank == 1 else Direct(call.target)


batch_rule(torch.cat, torch.concat, pure=True)(run_along(1, default=0))
rule(torch.stack, pure=True)(to_batch)


@batch_rule(torch.stack, pure=True)
def run_stack(call: Call) -> Direct:
    """A new dim beside the batch."""
    batch_dims = {operand.batch_dim for operand in call.tensor_arguments()}
    if len(batch_dims) != 1 or None in batch_dims:
        raise Unpackable("its operands hold the batch in different dims")
    return Direct(call.target)
