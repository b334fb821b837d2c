"""Linear layers of all branches in one product."""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treeify.rules.operations.packed import PackedOperation
from treeify.tree import Span


class PackedLinear(PackedOperation):
    """`G` linear layers in one product."""

    def forward(self, span: Span, x: Tensor) -> Tensor:
        """`[G*N, ..., I] -> [G*N, ..., O]`."""
        weight, bias = self.weight_and_bias(span)
        assert weight is not None
        return linear(x, weight, bias, span.size)


class LinearFunction(nn.Module):
    """`F.linear` with weights that the base model reads directly, `[G, O, I]` and `[G, O]`."""

    def forward(self, span: Span, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[G*N, ..., I] -> [G*N, ..., O]`."""
        bias = None if bias is None else bias.flatten(0, 1)
        return linear(x, weight.flatten(0, 1), bias, span.size)


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
    # Branch-major: one branch's rows lie together, so the batched product needs no copy of them.
    rows = x.reshape(count, prod(x.shape[:-1]) // count, features)
    columns = weight.view(count, outputs, features).transpose(1, 2)
    if bias is None:
        product = torch.bmm(rows, columns)
    else:
        product = torch.baddbmm(bias.view(count, 1, outputs), rows, columns)
    return product.view(*x.shape[:-1], outputs)
