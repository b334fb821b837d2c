"""Pooling, resizing and padding: every channel by itself, so packed channels run as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import adaptive_avgmax_pool as timm_pool
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import nn

from treeify.rules.call import Call, Unpackable
from treeify.rules.elementwise import Direct
from treeify.rules.operations.widened import Widened, widened
from treeify.rules.table import batch_rule, rule, widens

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


@widens(*_MODULES)
def pack_pool(pool: nn.Module, branches: int) -> None:
    """A pool is the same for any number of channels."""


@rule(*_MODULES, pure=True)
def pack_pool_module(call: Call) -> Widened:
    """Pools, resizes and pads with a channel dim before the dims they work on."""
    call.input_facts()
    call.require_rank()
    return widened(call)


@rule(*_FUNCTIONS, pure=True)
def pack_pool_function(call: Call) -> Direct:
    """The same as functions."""
    call.input_facts()
    call.require_rank()
    return Direct(call.node.target)


@rule(F.pad, pure=True)
def pack_pad(call: Call) -> Direct:
    """Padding of the dims after dim 1."""
    padding = call.argument(1, "pad", ())
    rank = len(call.input_facts().shape)
    if not isinstance(padding, Sequence) or len(padding) > 2 * (rank - 2):
        raise Unpackable("it pads dim 1")
    return Direct(call.node.target)


@batch_rule(*_MODULES, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, pure=True)
def run_pool_module(call: Call) -> Direct:
    """The same in the batch."""
    call.require_rank()
    return Direct(call.packed_module)


@batch_rule(*_FUNCTIONS, F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle, F.unfold, pure=True)
def run_pool_function(call: Call) -> Direct:
    """The same in the batch, as functions."""
    call.require_one_tensor()
    call.require_rank()
    return Direct(call.node.target)


@batch_rule(F.pad, pure=True)
def run_pad(call: Call) -> Direct:
    """Padding of the dims after the batch."""
    known = call.require_one_tensor()
    padding = call.argument(1, "pad", ())
    assert known.batch_dim is not None
    after = len(known.shape) - known.batch_dim - 1
    if not isinstance(padding, Sequence) or len(padding) > 2 * after:
        raise Unpackable("it pads the batch")
    return Direct(call.node.target)
