"""Einsum and attention of images with tensors of each branch."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_letters
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treeify.rules.operations.linear import linear
from treeify.rules.operations.packed import PackedOperation
from treeify.tracing.facts import TensorFacts
from treeify.tree import Span


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


class MaskedAttention(nn.Module):
    """Attention with a mask or bias of each branch, the same for all images."""

    def __init__(self, mask: TensorFacts, dim: int) -> None:
        super().__init__()
        self.mask, self.dim = mask, dim

    def forward(
        self,
        span: Span,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """`[G*N, heads, T, D]` and a mask `[G, 1, heads, T, T]` -> `[G*N, heads, T, D]`."""
        missing = [1] * (query.ndim - len(self.mask.shape))
        mask = attn_mask.reshape(span.size, *missing, *attn_mask.shape[1:]).movedim(0, self.dim)
        shape = list(mask.shape)
        shape[self.dim + 1] = query.shape[self.dim] // span.size
        mask = mask.expand(shape).flatten(self.dim, self.dim + 1)
        return F.scaled_dot_product_attention(query, key, value, mask, *args, **kwargs)


class PackedSelfAttention(PackedOperation):
    """`nn.MultiheadAttention` of tokens to themselves, with each branch's own projections.

    Args:
        module: the base architecture's attention, for its options.
        packed_module: holds its packed tensors.
        branches: how many branches it holds.
    """

    def __init__(
        self, module: nn.MultiheadAttention, packed_module: nn.Module, branches: int
    ) -> None:
        super().__init__(packed_module, branches)
        self.heads, self.dropout = module.num_heads, module.dropout

    def forward(self, span: Span, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """`[G*N, T, C] -> [G*N, T, C]`."""
        images, tokens, channels = query.shape
        projected = self._project(span, query, "in_proj_weight", "in_proj_bias")
        parts = projected.view(images, tokens, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.packed_module.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        mixed = mixed.transpose(1, 2).reshape(images, tokens, channels)
        return self._project(span, mixed, "out_proj.weight", "out_proj.bias"), None

    def _project(self, span: Span, x: Tensor, weight: str, bias: str) -> Tensor:
        matrix = self.part(span, weight)
        assert matrix is not None
        return linear(x, matrix, self.part(span, bias), span.size)
