"""Tensors joined along a dim that exists, or along a new one."""

from __future__ import annotations

import torch
from torch import nn

from treeify.rules.call import Call, Unpackable
from treeify.rules.image_by_image import run_along, to_batch
from treeify.rules.operations.channels import ConcatenateChannels
from treeify.rules.operations.direct import Direct
from treeify.rules.table import batch_rule, rule


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
