"""Normalisation: per channel or per group, so branches do not mix once the count is multiplied."""

from collections.abc import Sequence

import torch.nn.functional as F
from timm.layers import norm as timm_norm
from timm.layers import norm_act as timm_norm_act
from torch import fx, nn
from torchvision.models import convnext
from torchvision.ops.misc import FrozenBatchNorm2d

from treeify.rules.call import Call, Unpackable
from treeify.rules.elementwise import ACTIVATIONS
from treeify.rules.operations.norm import (
    GroupNormFunction,
    NormFunction,
    NormInBatch,
    PackedLayerNorm,
)
from treeify.rules.operations.widened import OfRows, Widened
from treeify.rules.table import batch_rule, rule, widens
from treeify.rules.widening import of_rows, unchanged, widened
from treeify.tracing.facts import facts

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d)
_GROUP_NORMS = (nn.GroupNorm, timm_norm.GroupNorm, timm_norm.GroupNorm1)
_LAYER_NORMS = (nn.LayerNorm, timm_norm.LayerNorm)
_RMS_NORMS = (nn.RMSNorm, timm_norm.RmsNorm)
_CHANNEL_LAYER_NORMS = (timm_norm.LayerNorm2d, convnext.LayerNorm2d)
_NORM_ACTS = (timm_norm_act.BatchNormAct2d, timm_norm_act.GroupNormAct)


@widens(*_BATCH_NORMS, *_INSTANCE_NORMS, timm_norm_act.BatchNormAct2d)
def pack_channel_norm_module(norm: nn.BatchNorm2d, branches: int) -> None:
    """`branches` norms of single channels as one over all channels."""
    norm.num_features *= branches


@widens(*_GROUP_NORMS, timm_norm_act.GroupNormAct)
def pack_group_norm_module(norm: nn.GroupNorm, branches: int) -> None:
    """`branches` group norms as one with as many more groups."""
    norm.num_groups *= branches
    norm.num_channels *= branches


widens(FrozenBatchNorm2d)(unchanged)  # every channel has its own constants already
rule(FrozenBatchNorm2d)(widened)


@rule(*_INSTANCE_NORMS)
def pack_instance_norm(call: Call) -> Widened:
    """Instance norms."""
    call.input_facts()
    call.require_rank()
    return widened(call, of_channels=True)


@rule(*_BATCH_NORMS, *_GROUP_NORMS, *_NORM_ACTS)
def pack_norm(call: Call) -> Widened:
    """Batch and group norms."""
    norm = call.module
    if type(norm) in _NORM_ACTS:
        if type(norm.act) not in ACTIVATIONS:
            raise Unpackable("its activation is not element-wise")
        if type(norm.drop) not in (nn.Identity, nn.Dropout):
            raise Unpackable("its dropout draws for several channels at once")
    return widened(call, of_channels=True)


@batch_rule(*_BATCH_NORMS)
def run_batch_norm(call: Call) -> OfRows:
    """Batch norms of several rows for each image."""
    return of_rows(call, of_channels=True)


@rule(*_CHANNEL_LAYER_NORMS)
def pack_channel_layer_norm(call: Call) -> PackedLayerNorm:
    """Layer norms over the channels of images."""
    operand = call.input_facts()
    _require_exact(call.module)
    if len(operand.shape) < 3:
        raise Unpackable("its input has no channel dim")
    return PackedLayerNorm(call.packed_module, call.branches, call.module.eps)


@batch_rule(*_LAYER_NORMS, *_RMS_NORMS, first=True)
def run_norm(call: Call) -> NormInBatch:
    """Norms over the last dims; they share nothing between images."""
    norm = call.module
    _require_exact(norm)
    shape = tuple(norm.normalized_shape)
    _require_batch_beside(call, len(shape))
    function = F.layer_norm if isinstance(norm, nn.LayerNorm) else F.rms_norm
    return NormInBatch(call.packed_module, call.branches, function, shape, norm.eps, call.ratio)


def _require_exact(norm: nn.Module) -> None:
    if getattr(norm, "_fast_norm", False):
        raise Unpackable("timm's fast norm is switched on")


def _require_batch_beside(call: Call, dims: int) -> None:
    """Refuse a norm whose last `dims` dims may hold the batch."""
    operand = call.batch_facts()
    if operand.batch_dim != 0 or dims >= len(operand.shape):
        raise Unpackable("it normalises over the batch")


@batch_rule(F.layer_norm, F.rms_norm, first=True)
def run_norm_function(call: Call) -> NormFunction:
    """Norms over the last dims, with each branch's own weight and bias."""
    places = [(2, "weight"), (3, "bias")] if call.target is F.layer_norm else [(2, "weight")]
    weight, *bias = call.branch_tensors(*places)
    if weight is None and any(bias):
        raise Unpackable("it has a bias and no weight")
    argument = call.argument(1, "normalized_shape")
    shape = facts(argument).grows if isinstance(argument, fx.Node) else argument
    if not isinstance(shape, Sequence):
        raise Unpackable("how many dims it works along is not a constant")
    _require_batch_beside(call, len(shape))
    return NormFunction(call.target)


@rule(F.group_norm)
def pack_group_norm_function(call: Call) -> GroupNormFunction:
    """`F.group_norm` with each branch's own weight and bias."""
    call.branch_tensors((2, "weight"), (3, "bias"))
    call.input_facts()
    return GroupNormFunction()
