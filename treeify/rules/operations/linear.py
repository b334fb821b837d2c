"""Linear layers of all branches in one product, and einsum with tensors of each branch."""

from collections.abc import Sequence
from math import prod
from string import ascii_letters

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
    """Each branch's own linear layer: `[G*N, ..., I]`, `[G*O, I]` and `[G*O] -> [G*N, ..., O]`."""
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


class EinsumOfBranches(nn.Module):
    """Products of images with tensors of each branch: one letter more, for the branches.

    Args:
        sources: the base model's subscripts of each operand.
        target: those of the result.
        dims: where each operand holds the batch; None for one value a branch, and -1 for one value
            for all branches.
        dim: where the result holds it.
    """

    def __init__(
        self, sources: Sequence[str], target: str, dims: Sequence[int | None], dim: int
    ) -> None:
        super().__init__()
        used = {*target, *"".join(sources)}
        letter = next(letter for letter in ascii_letters if letter not in used)

        def with_branch(subscripts: str, at: int | None) -> str:
            at = at or 0
            return subscripts if at < 0 else subscripts[:at] + letter + subscripts[at:]

        left = ",".join(map(with_branch, sources, dims))
        self.equation = f"{left}->{with_branch(target, dim)}"
        self.dims, self.dim = dims, dim

    def forward(self, span: Span, equation: str, *operands: Tensor) -> Tensor:
        """`[..., G*N, ...]`, from such operands and `[G, ...]`."""
        by_branch = [
            operand if at is None or at < 0 else torch.unflatten(operand, at, (span.size, -1))
            for operand, at in zip(operands, self.dims, strict=True)
        ]
        result: Tensor = torch.einsum(self.equation, *by_branch)
        return result.flatten(self.dim, self.dim + 1)

    def extra_repr(self) -> str:
        """The equation that runs."""
        return self.equation
