"""Normalisation: per channel or per group, so branches do not mix once the count is multiplied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import norm as timm_norm
from timm.layers import norm_act as timm_norm_act
from torch import Tensor, fx, nn
from torchvision.models import convnext
from torchvision.ops.misc import FrozenBatchNorm2d

from treeify.engine.forms import merge_branches, split_branches
from treeify.engine.packed_tensors import narrow
from treeify.rules.call import Call, Unpackable
from treeify.rules.elementwise import ACTIVATIONS
from treeify.rules.operations.widened import OfRows, Widened, of_rows, widened
from treeify.rules.table import batch_rule, rule, widens
from treeify.tracing.facts import facts
from treeify.tree import Span

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_GROUP_NORMS = (nn.GroupNorm, timm_norm.GroupNorm, timm_norm.GroupNorm1)
_LAYER_NORMS = (nn.LayerNorm, timm_norm.LayerNorm)
_RMS_NORMS = (nn.RMSNorm, timm_norm.RmsNorm)
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


@rule(nn.InstanceNorm1d, nn.InstanceNorm2d)
def pack_instance_norm_call(call: Call) -> Widened:
    """Instance norms."""
    call.input_facts()
    call.require_rank()
    return widened(call, of_channels=True)


@rule(*_BATCH_NORMS, *_GROUP_NORMS, *_NORM_ACTS)
def pack_norm(call: Call) -> Widened:
    """Batch and group norms."""
    norm: Any = call.module
    _require_momentum(norm)
    if type(norm) in _NORM_ACTS:
        if type(norm.act) not in ACTIVATIONS:
            raise Unpackable("its activation is no function of single numbers")
        if type(norm.drop) not in (nn.Identity, nn.Dropout):
            raise Unpackable("its dropout draws for several channels at once")
    return widened(call, of_channels=True)


def _require_momentum(norm: nn.Module | None) -> None:
    if getattr(norm, "momentum", 0.0) is None:
        raise Unpackable("momentum=None averages over a counter that each branch has of its own")


@batch_rule(*_BATCH_NORMS)
def run_batch_norm(call: Call) -> OfRows:
    """Batch norms of several rows for each image."""
    _require_momentum(call.module)
    return of_rows(call, of_channels=True)


rule(FrozenBatchNorm2d)(widened)


class PackedLayerNorm(nn.Module):
    """Layer norms over each branch's own channels, with each branch's own scale.

    Args:
        storage: holds the packed `weight` and `bias`, `[G*C]`, or None.
        branches: how many branches the storage holds.
        eps: added to the variance.
    """

    def __init__(self, storage: nn.Module, branches: int, eps: float) -> None:
        super().__init__()
        self.storage, self.branches, self.eps = storage, branches, eps

    def forward(self, span: Span, x: Tensor) -> Tensor:
        """`[N, G*C, H, W] -> [N, G*C, H, W]`."""
        weight, bias = (_part(self.storage, name, self.branches, span) for name in _AFFINE)
        if span.size == 1:
            channels = (x.shape[1],)
            x = F.layer_norm(x.movedim(1, -1), channels, weight, bias, self.eps)
            return x.movedim(-1, 1)
        x = split_branches(x, span.size).movedim(2, -1)
        x = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        shape = (span.size, *[1] * (x.ndim - 3), x.shape[-1])
        return merge_branches(_affine(x, weight, bias, shape).movedim(-1, 2))


_AFFINE = ("weight", "bias")


def _part(storage: nn.Module, name: str, branches: int, span: Span) -> Tensor | None:
    tensor = getattr(storage, name, None)
    return None if tensor is None else narrow(tensor, branches, span)


def _affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...]
) -> Tensor:
    """Scale and shift; `shape` lets the packed tensors broadcast over `x`."""
    if weight is None:
        return x
    if bias is None:
        return x * weight.view(shape)
    return torch.addcmul(bias.view(shape), x, weight.view(shape))


@rule(*_CHANNEL_LAYER_NORMS)
def pack_channel_layer_norm(call: Call) -> PackedLayerNorm:
    """Layer norms over the channels of images."""
    norm: Any = call.module
    known = call.input_facts()
    _require_plain(norm)
    if len(known.shape) < 3:
        raise Unpackable("its input has no channel dim")
    return PackedLayerNorm(call.packed_module, call.branches, norm.eps)


def _require_plain(norm: nn.Module) -> None:
    if getattr(norm, "_fast_norm", False):
        raise Unpackable("timm's fast norm is switched on")


class NormInBatch(nn.Module):
    """Layer or root-mean-square norms over the last dims, with each branch's own scale.

    Siblings of a split normalise their parent's features once.

    Args:
        storage: holds the packed `weight` and `bias`, `[G*D1, ...]`, or None.
        branches: how many branches the storage holds.
        shape: the normalised shape `(D1, ...)` of one branch.
        normalise: the base model's norm of `(x, weight, bias)`.
        ratio: siblings per input branch; above 1 only right after a split.
    """

    def __init__(
        self,
        storage: nn.Module,
        branches: int,
        shape: tuple[int, ...],
        normalise: Callable[..., Tensor],
        ratio: int,
    ) -> None:
        super().__init__()
        self.storage, self.branches, self.ratio = storage, branches, ratio
        self.shape, self.normalise = shape, normalise

    def forward(self, span: Span, x: Tensor) -> Tensor:
        """`[P*N, ..., D1, ...]` of the span's `P` parents -> `[G*N, ..., D1, ...]`."""
        weight, bias = (_part(self.storage, name, self.branches, span) for name in _AFFINE)
        if span.size == 1:
            return self.normalise(x, weight, bias)
        parents = span.parents(self.ratio)
        x = self.normalise(x, None, None)
        x = torch.unflatten(x, 0, (parents.size, x.shape[0] // parents.size))
        whole = parents.size * self.ratio == span.size
        if whole and weight is not None:
            # [P, 1, N, ...] times [P, siblings, 1, ...]
            between = [1] * (x.ndim - 1 - len(self.shape))
            shape = (parents.size, self.ratio, *between, *self.shape)
            return _affine(x.unsqueeze(1), weight, bias, shape).flatten(0, 2)
        if parents.size != span.size:
            x = x[[branch // self.ratio - parents.start for branch in range(*span)]]
        shape = (span.size, *[1] * (x.ndim - 1 - len(self.shape)), *self.shape)
        return _affine(x, weight, bias, shape).flatten(0, 1)


@batch_rule(*_LAYER_NORMS, *_RMS_NORMS, first=True)
def run_norm(call: Call) -> NormInBatch:
    """Norms over the last dims; they share nothing between images."""
    norm: Any = call.module
    known = call.batch_facts()
    _require_plain(norm)
    shape = tuple(norm.normalized_shape)
    if known.batch_dim != 0 or len(shape) >= len(known.shape):
        raise Unpackable("it normalises over the batch")
    if isinstance(norm, nn.LayerNorm):

        def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            return F.layer_norm(x, shape, weight, bias, norm.eps)
    else:

        def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            return F.rms_norm(x, list(shape), weight, norm.eps)

    return NormInBatch(call.packed_module, call.branches, shape, normalise, call.ratio)


def _scaled(span: Span, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """`[G*N, ..., D1, ...]` by scales `[G, D1, ...]`."""
    if weight is None:
        return x
    branches = torch.unflatten(x, 0, (span.size, -1))
    between = [1] * (branches.ndim - weight.ndim)
    shape = (span.size, *between, *weight.shape[1:])
    return _affine(branches, weight, bias, shape).flatten(0, 1)


# What follows input, shape and weight.
_REST: dict[Any, tuple[str, ...]] = {F.layer_norm: ("bias", "eps"), F.rms_norm: ("eps",)}


class NormFunction(nn.Module):
    """`F.layer_norm` or `F.rms_norm` with scales that the base model reads itself."""

    def __init__(self, target: Callable[..., Tensor]) -> None:
        super().__init__()
        self.target = target

    def forward(
        self,
        span: Span,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        *rest: Any,
        **named: Any,
    ) -> Tensor:
        """`[G*N, ..., D1, ...]` and `[G, D1, ...]` -> `[G*N, ..., D1, ...]`."""
        options = {**dict(zip(_REST[self.target], rest, strict=False)), **named}
        bias = options.pop("bias", None)
        return _scaled(span, self.target(input, list(normalized_shape), **options), weight, bias)


@batch_rule(*_REST, first=True)
def run_norm_function(call: Call) -> NormFunction:
    """Norms over the last dims, with each branch's own weight and bias."""
    target: Any = call.node.target
    weight, *bias = call.branch_tensors((2, "weight"), *[(3, "bias")] * ("bias" in _REST[target]))
    if weight is None and any(bias):
        raise Unpackable("it has a bias and no weight")
    given = call.argument(1, "normalized_shape")
    shape = facts(given).grows if isinstance(given, fx.Node) else given
    if not isinstance(shape, Sequence):
        raise Unpackable("how many dims it works along is not a constant")
    known = call.batch_facts()
    if known.batch_dim != 0 or len(shape) >= len(known.shape):
        raise Unpackable("it normalises over the batch")
    return NormFunction(target)


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
        weight, bias = (None if own is None else own.flatten(0, 1) for own in (weight, bias))
        return F.group_norm(input, num_groups * span.size, weight, bias, eps)


@rule(F.group_norm)
def pack_group_norm_function(call: Call) -> GroupNormFunction:
    """`F.group_norm` with each branch's own weight and bias."""
    call.branch_tensors((2, "weight"), (3, "bias"))
    call.input_facts()
    return GroupNormFunction()
