"""Linear layers: a batched matrix product over the branches."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers.linear import Linear as TimmLinear
from torch import nn

from treeify.rules.call import Call, Unpackable
from treeify.rules.operations.linear import LinearFunction, PackedLinear
from treeify.rules.table import batch_rule


@batch_rule(nn.Linear, TimmLinear, first=True)
def run_linear(call: Call) -> PackedLinear:
    """Linear layers on `[N, ..., I]`."""
    call.batch_first_facts(least_rank=2)
    return PackedLinear(call.packed_module, call.branches)


@batch_rule(F.linear, first=True)
def run_linear_function(call: Call) -> LinearFunction:
    """`F.linear` on `[N, ..., I]` with each branch's own weight and bias."""
    call.batch_first_facts(least_rank=2)
    weight, bias = call.branch_tensors((1, "weight"), (2, "bias"))
    if weight is None or len(weight.shape) != 2 or (bias and bias.shape != weight.shape[:1]):
        raise Unpackable("its weight and bias are not [O, I] and [O]")
    return LinearFunction()
