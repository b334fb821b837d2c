"""Attention of images with tensors of each branch."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from treeify.rules.operations.linear import linear
from treeify.rules.operations.packed import PackedOperation
from treeify.tracing.facts import TensorFacts
from treeify.tree import Span


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
    """`nn.MultiheadAttention` of tokens to themselves, with each branch's own projections."""

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
