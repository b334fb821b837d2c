"""Sizes, ranks and dtypes that the base model reads of its tensors: the same for all branches."""

from __future__ import annotations

from typing import Any

from torch import nn

from treeify.rules.call import Call, Unpackable
from treeify.rules.operations.direct import Direct
from treeify.rules.operations.shapes import BranchShape
from treeify.rules.table import batch_rule, rule

SHAPE_READINGS: tuple[Any, ...] = (
    *("size", "dim", "numel", "ndimension", "is_floating_point", getattr),
)
_NO_READING = "it reads a tensor attribute"


@rule(*SHAPE_READINGS, pure=True)
def pack_shape_reading(call: Call) -> BranchShape:
    """Readings of packed tensors."""
    call.input_facts()
    if call.facts.tensors:
        raise Unpackable(_NO_READING)
    return BranchShape(call.target, 1)


@batch_rule(*SHAPE_READINGS, pure=True)
def run_shape_reading(call: Call) -> nn.Module:
    """Readings of tensors in the batch; `x.T` and `x.data` are tensors themselves."""
    operand = call.batch_facts()
    if not call.facts.tensors:
        assert operand.batch_dim is not None
        return BranchShape(call.target, operand.batch_dim)
    if call.argument(1, "name") not in ("T", "mT", "data"):
        raise Unpackable(_NO_READING)
    return Direct(call.target)
