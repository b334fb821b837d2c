"""Norms with the scales and shifts of each branch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treeify.engine.forms import merge_branches, split_branches
from treeify.rules.operations.direct import TargetOperation
from treeify.rules.operations.packed import PackedOperation
from treeify.tree import Span


class PackedLayerNorm(PackedOperation):
    """Layer norms over each branch's own channels, with scales and shifts `[G*C]`, or none."""

    def __init__(self, packed_module: nn.Module, branches: int, eps: float) -> None:
        super().__init__(packed_module, branches)
        self.eps = eps

    def forward(self, span: Span, x: Tensor) -> Tensor:
        """`[N, G*C, H, W] -> [N, G*C, H, W]`."""
        weight, bias = self.weight_and_bias(span)
        if span.size == 1:
            channels = (x.shape[1],)
            x = F.layer_norm(x.movedim(1, -1), channels, weight, bias, self.eps)
            return x.movedim(-1, 1)
        x = split_branches(x, span.size).movedim(2, -1)
        x = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        shape = (span.size, *[1] * (x.ndim - 3), x.shape[-1])
        return merge_branches(_affine(x, weight, bias, shape).movedim(-1, 2))


class NormInBatch(PackedOperation):
    """Layer or root-mean-square norms over the last dims, with each branch's own scale.

    Siblings of a split, `ratio` for each parent, normalise the parent's features once. Scales and
    shifts are `[G*D1, ...]`, or none, where one branch's `shape` is `(D1, ...)`.
    """

    def __init__(
        self,
        packed_module: nn.Module,
        branches: int,
        function: Callable[..., Tensor],
        shape: tuple[int, ...],
        eps: float | None,
        ratio: int,
    ) -> None:
        super().__init__(packed_module, branches)
        self.function, self.shape, self.eps, self.ratio = function, shape, eps, ratio

    def forward(self, span: Span, x: Tensor) -> Tensor:
        """`[P*N, ..., D1, ...]` of the span's `P` parents -> `[G*N, ..., D1, ...]`."""
        weight, bias = self.weight_and_bias(span)
        if span.size == 1:
            return self._normalise(x, weight, bias)
        parents = span.parents(self.ratio)
        x = self._normalise(x, None, None)
        x = torch.unflatten(x, 0, (parents.size, x.shape[0] // parents.size))
        all_siblings = parents.size * self.ratio == span.size
        if all_siblings and weight is not None:
            # [P, 1, N, ...] times [P, siblings, 1, ...]
            between = [1] * (x.ndim - 1 - len(self.shape))
            shape = (parents.size, self.ratio, *between, *self.shape)
            return _affine(x.unsqueeze(1), weight, bias, shape).flatten(0, 2)
        if parents.size != span.size:
            x = x[[branch // self.ratio - parents.start for branch in range(*span)]]
        shape = (span.size, *[1] * (x.ndim - 1 - len(self.shape)), *self.shape)
        return _affine(x, weight, bias, shape).flatten(0, 1)

    def _normalise(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if self.function is F.rms_norm:
            return F.rms_norm(x, list(self.shape), weight, self.eps)
        return self.function(x, self.shape, weight, bias, self.eps)


class NormFunction(TargetOperation):
    """`F.layer_norm` or `F.rms_norm` with scales that the base model reads itself."""

    def forward(
        self,
        span: Span,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        *options: Any,
        **named: Any,
    ) -> Tensor:
        """`[G*N, ..., D1, ...]` and `[G, D1, ...]` -> `[G*N, ..., D1, ...]`."""
        names = ("bias", "eps") if self.target is F.layer_norm else ("eps",)
        named.update(zip(names, options, strict=False))
        bias = named.pop("bias", None)
        x: Tensor = self.target(input, list(normalized_shape), **named)
        if weight is None:
            return x
        x = torch.unflatten(x, 0, (span.size, -1))
        between = [1] * (x.ndim - weight.ndim)
        shape = (span.size, *between, *weight.shape[1:])
        return _affine(x, weight, bias, shape).flatten(0, 1)


class GroupNormFunction(nn.Module):
    """`F.group_norm` with scales that the base model reads itself."""

    def forward(
        self,
        span: Span,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        """`[N, G*C, ...]` and `[G, C]` -> `[N, G*C, ...]`."""
        weight = None if weight is None else weight.flatten(0, 1)
        bias = None if bias is None else bias.flatten(0, 1)
        return F.group_norm(input, num_groups * span.size, weight, bias, eps)


def _affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...]
) -> Tensor:
    """Scale and shift; `shape` lets the packed tensors broadcast over `x`."""
    if weight is None:
        return x
    if bias is None:
        return x * weight.view(shape)
    return torch.addcmul(bias.view(shape), x, weight.view(shape))
