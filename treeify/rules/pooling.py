"""Pooling, resizing and padding: every channel by itself, so packed channels run as they are."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import adaptive_avgmax_pool as timm_pool
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import nn

from treeify.rules.call import Call, Unpackable
from treeify.rules.operations.direct import Direct
from treeify.rules.table import batch_rule, rule, widens
from treeify.rules.widening import unchanged, widened

_MODULES = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.LPPool2d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
    *(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
    *(nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d),
    *(AvgPool2dSame, MaxPool2dSame, timm_pool.AdaptiveAvgMaxPool2d),
)
_FUNCTIONS = (
    *(F.max_pool1d, F.max_pool2d, F.avg_pool1d, F.avg_pool2d, F.lp_pool2d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate),
    torch.max_pool2d,
)


widens(*_MODULES)(unchanged)


@rule(*_MODULES, *_FUNCTIONS, pure=True)
def pack_pool(call: Call) -> nn.Module:
    """Pools, resizes and pads with a channel dim before the dims they work on."""
    call.input_facts()
    call.require_rank()
    return Direct(call.target) if call.module is None else widened(call)


@batch_rule(*_MODULES, *_FUNCTIONS, F.unfold, pure=True)
def run_pool(call: Call) -> Direct:
    """Pools, resizes and pads of more images."""
    call.require_one_tensor()
    call.require_rank()
    return Direct(call.target)


@rule(F.pad, pure=True)
def pack_pad(call: Call) -> Direct:
    """Padding of the dims after dim 1."""
    _require_dims_to_pad(call, len(call.input_facts().shape) - 2, "dim 1")
    return Direct(call.target)


@batch_rule(F.pad, pure=True)
def run_pad(call: Call) -> Direct:
    """Padding of the dims after the batch."""
    operand = call.require_one_tensor()
    assert operand.batch_dim is not None
    _require_dims_to_pad(call, len(operand.shape) - operand.batch_dim - 1, "the batch")
    return Direct(call.target)


def _require_dims_to_pad(call: Call, dims: int, before: str) -> None:
    """Refuse padding of more than the last `dims` dims."""
    padding = call.argument(1, "pad", ())
    if not isinstance(padding, Sequence) or len(padding) > 2 * dims:
        raise Unpackable(f"it pads {before}")
