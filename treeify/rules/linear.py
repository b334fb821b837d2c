"""Linear layers: a batched matrix product over the branches."""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from timm.layers.linear import Linear as TimmLinear
from torch import Tensor, nn

from treeify.engine.packed_tensors import narrow
from treeify.rules.call import Call, Unpackable
from treeify.rules.table import batch_rule
from treeify.tree import Span


class PackedLinear(nn.Module):
    """`G` linear layers in one product.

    Args:
        storage: holds the packed `weight` `[G*O, I]` and `bias` `[G*O]` or None.
        branches: how many branches the storage holds.
    """

    def __init__(self, storage: nn.Module, branches: int) -> None:
        super().__init__()
        self.storage, self.branches = storage, branches

    def forward(self, span: Span, x: Tensor) -> Tensor:
        """`[G*N, ..., I] -> [G*N, ..., O]`."""
        weight: Tensor = narrow(self.storage.weight, self.branches, span)
        bias = self.storage.bias
        bias = None if bias is None else narrow(bias, self.branches, span)
        return linear(x, weight, bias, span.size)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, count: int) -> Tensor:
    """Each branch's own linear layer on its part of the batch.

    Args:
        x: `[G*N, ..., I]`.
        weight: `[G*O, I]`.
        bias: `[G*O]` or None.
        count: branches `G`.

    Returns:
        `[G*N, ..., O]`.
    """
    if count == 1:
        return F.linear(x, weight, bias)
    features, outputs = weight.shape[-1], weight.shape[0] // count
    rows = x.reshape(count, prod(x.shape[:-1]) // count, features)
    columns = weight.view(count, outputs, features).transpose(1, 2)
    if bias is None:
        product = torch.bmm(rows, columns)
    else:
        product = torch.baddbmm(bias.view(count, 1, outputs), rows, columns)
    return product.view(*x.shape[:-1], outputs)


@batch_rule(nn.Linear, TimmLinear, first=True)
def run_linear(call: Call) -> PackedLinear:
    """Linear layers on `[N, ..., I]`."""
    known = call.batch_facts()
    if known.batch_dim != 0 or len(known.shape) < 2:
        raise Unpackable("its input does not begin with the batch")
    return PackedLinear(call.packed_module, call.branches)


class LinearFunction(nn.Module):
    """`F.linear` with weights that the base model reads directly, `[G, O, I]` and `[G, O]`."""

    def forward(self, span: Span, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[G*N, ..., I] -> [G*N, ..., O]`."""
        bias = None if bias is None else bias.flatten(0, 1)
        return linear(x, weight.flatten(0, 1), bias, span.size)


@batch_rule(F.linear, first=True)
def run_linear_function(call: Call) -> LinearFunction:
    """`F.linear` on `[N, ..., I]` with each branch's own weight and bias."""
    known = call.batch_facts()
    if known.batch_dim != 0 or len(known.shape) < 2:
        raise Unpackable("its input does not begin with the batch")
    weight, bias = call.branch_tensors((1, "weight"), (2, "bias"))
    if weight is None or len(weight.shape) != 2 or (bias and bias.shape != weight.shape[:1]):
        raise Unpackable("its weight and bias are no [O, I] and [O]")
    return LinearFunction()
