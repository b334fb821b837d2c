"""Linear layers: a batched matrix product over the branches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers.linear import Linear as TimmLinear
from torch import Tensor, nn

from treeify.packing import read_once
from treeify.rules.registry import Call, rule
from treeify.storage import narrow
from treeify.trace import TensorFacts
from treeify.tree import Span


class PackedLinear(nn.Module):
    """`G` linear layers in one product; siblings of a split read their parent's features once.

    Args:
        storage: holds the packed `weight` `[G*O, I]` and `bias` `[G*O]` or None.
        branches: how many branches the storage holds.
        ratio: siblings per input branch; above 1 only right after a split.
        known: facts of the input.
    """

    def __init__(self, storage: nn.Module, branches: int, ratio: int, known: TensorFacts) -> None:
        super().__init__()
        self.storage, self.branches, self.ratio, self.known = storage, branches, ratio, known

    def forward(self, span: Span, x: Tensor) -> Tensor:
        """`[N, P*I] -> [N, G*O]`, or `[N, P*T, ..., I] -> [N, G*T, ..., O]`."""
        weight: Tensor = narrow(self.storage.weight, self.branches, span)  # type: ignore[arg-type]
        bias = self.storage.bias
        bias = None if bias is None else narrow(bias, self.branches, span)  # type: ignore[arg-type]
        parents, x = read_once(span, self.ratio, x, self.known)
        if span.size == 1 or (x.ndim == 2 and parents == 1):
            return F.linear(x, weight, bias)
        return _grouped_linear(x, weight, bias, parents, span.size)


def _grouped_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, parents: int, branches: int
) -> Tensor:
    """`branches / parents` linear layers on each parent's features."""
    features = x.shape[-1] // parents if x.ndim == 2 else x.shape[-1]
    # [N, P*T, ..., I] -> [P, N*M, I] with M = T * ...; a vector [N, P*I] has M = 1
    batch, branched = x.shape[:2]
    middle = 1 if x.ndim == 2 else x.shape[1:-1].numel() // parents
    rows = x.reshape(batch, parents, middle, features).transpose(0, 1)
    rows = rows.reshape(parents, batch * middle, features)
    columns = weight.view(parents, -1, features).transpose(1, 2)
    product = (
        torch.bmm(rows, columns)
        if bias is None
        else torch.baddbmm(bias.view(parents, 1, -1), rows, columns)
    )
    siblings = branches // parents
    # [P, N, M, S, O] -> [N, P, S, M, O]
    outputs = weight.shape[0] // branches
    result = product.view(parents, batch, middle, siblings, outputs).permute(1, 0, 3, 2, 4)
    if x.ndim == 2:
        return result.reshape(batch, branches * outputs)
    return result.reshape(batch, branches * (branched // parents), *x.shape[2:-1], outputs)


@rule(nn.Linear, TimmLinear)
def pack_linear(call: Call) -> PackedLinear:
    """Linear layers on `[N, I]` or `[N, T, ..., I]`."""
    known = call.input_facts()
    assert call.storage is not None
    return PackedLinear(call.storage, call.branches, call.ratio, known)
