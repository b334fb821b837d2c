"""Normalisation: per channel or per group, so branches do not mix once the count is multiplied."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import norm as timm_norm
from timm.layers import norm_act as timm_norm_act
from torch import Tensor, nn
from torchvision.models import convnext
from torchvision.ops.misc import FrozenBatchNorm2d

from treeify.packing import refold, unfold
from treeify.rules.registry import Call, Unpackable, rule, widens
from treeify.rules.widened import Widened, widened
from treeify.storage import narrow
from treeify.tree import Span

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_GROUP_NORMS = (nn.GroupNorm, timm_norm.GroupNorm, timm_norm.GroupNorm1)
_LAYER_NORMS = (nn.LayerNorm, timm_norm.LayerNorm)
_CHANNEL_LAYER_NORMS = (timm_norm.LayerNorm2d, convnext.LayerNorm2d)
_NORM_ACTS = (timm_norm_act.BatchNormAct2d, timm_norm_act.GroupNormAct)


@widens(*_BATCH_NORMS, timm_norm_act.BatchNormAct2d)
def pack_batch_norm(norm: nn.BatchNorm2d, branches: int) -> None:
    """`branches` batch norms as one over all channels."""
    norm.num_features *= branches


@widens(*_GROUP_NORMS, timm_norm_act.GroupNormAct)
def pack_group_norm(norm: nn.GroupNorm, branches: int) -> None:
    """`branches` group norms as one with as many more groups."""
    norm.num_groups *= branches
    norm.num_channels *= branches


@widens(nn.InstanceNorm1d, nn.InstanceNorm2d)
def pack_instance_norm(norm: nn.InstanceNorm2d, branches: int) -> None:
    """`branches` instance norms as one over all channels."""
    norm.num_features *= branches


@widens(FrozenBatchNorm2d)
def pack_frozen_batch_norm(norm: nn.Module, branches: int) -> None:
    """Every channel has its own constants already."""


@rule(*_BATCH_NORMS, *_GROUP_NORMS, *_NORM_ACTS, nn.InstanceNorm1d, nn.InstanceNorm2d)
def pack_norm(call: Call) -> Widened:
    """Batch, group and instance norms."""
    norm: Any = call.module
    if getattr(norm, "momentum", 0.0) is None:
        raise Unpackable("momentum=None averages over a counter that each branch has of its own")
    if any(True for child in norm.children() for _ in (*child.parameters(), *child.buffers())):
        raise Unpackable("its activation has parameters")
    return widened(call)


rule(FrozenBatchNorm2d)(widened)


class PackedLayerNorm(nn.Module):
    """Layer norms over each branch's own features, with each branch's own scale.

    Args:
        storage: holds the packed `weight` and `bias`, `[G*D1, ...]`, or None.
        branches: how many branches the storage holds.
        shape: the normalised shape `(D1, ...)` of one branch.
        eps: added to the variance.
        channels: normalise over dim 1 of `[N, C, H, W]` instead of the last dims.
    """

    def __init__(
        self,
        storage: nn.Module,
        branches: int,
        shape: tuple[int, ...],
        eps: float,
        *,
        channels: bool,
    ) -> None:
        super().__init__()
        self.storage, self.branches, self.eps = storage, branches, eps
        self.shape, self.channels = shape, channels

    def forward(self, span: Span, x: Tensor) -> Tensor:
        """`[N, G*C, ...] -> [N, G*C, ...]`."""
        weight, bias = (self._part(name, span) for name in ("weight", "bias"))
        if span.size == 1:
            return self._single(x, weight, bias)
        x = unfold(x, span.size)
        if self.channels:
            x = x.movedim(2, -1)
        x = F.layer_norm(x, self.shape, eps=self.eps)
        between = x.ndim - 2 - len(self.shape)
        scale, shift = (
            None if part is None else part.view(span.size, *[1] * between, *self.shape)
            for part in (weight, bias)
        )
        if scale is not None and shift is not None:
            x = torch.addcmul(shift, x, scale)
        elif scale is not None:
            x = x * scale
        return refold(x.movedim(-1, 2) if self.channels else x)

    def _single(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """One branch: the base model's own operation."""
        if self.channels:
            x = x.movedim(1, -1)
        x = F.layer_norm(x, self.shape, weight, bias, self.eps)
        return x.movedim(-1, 1) if self.channels else x

    def _part(self, name: str, span: Span) -> Tensor | None:
        tensor = getattr(self.storage, name, None)
        return None if tensor is None else narrow(tensor, self.branches, span)


@rule(*_LAYER_NORMS, *_CHANNEL_LAYER_NORMS)
def pack_layer_norm(call: Call) -> PackedLayerNorm:
    """Layer norms; per branch they share nothing, so only the scale needs care."""
    norm: Any = call.module
    known = call.input_facts()
    if getattr(norm, "_fast_norm", False):
        raise Unpackable("timm's fast norm is switched on")
    channels = type(norm) in _CHANNEL_LAYER_NORMS
    if len(norm.normalized_shape) >= len(known.shape):
        raise Unpackable("it normalises over the batch")
    assert call.storage is not None
    return PackedLayerNorm(
        call.storage, call.branches, tuple(norm.normalized_shape), norm.eps, channels=channels
    )
