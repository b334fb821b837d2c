"""Convolutions: `G` of them are one grouped convolution (the paper's Figure 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.cond_conv2d import CondConv2d
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn

from treeify.engine.packed_tensors import call_with, narrow
from treeify.rules.call import Call, Unpackable
from treeify.rules.operations.widened import OfRows, of_rows, widened, widened_conv
from treeify.rules.table import batch_rule, rule, widens
from treeify.tree import Span

# timm's padded and weight-standardised convolutions treat every output channel by itself, so they
# are grouped convolutions once their channels and groups are multiplied.
_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    Conv2dSame,
    StdConv2d,
    StdConv2dSame,
    ScaledStdConv2d,
    ScaledStdConv2dSame,
)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@widens(*_CONVOLUTIONS, *_TRANSPOSED)
def pack_conv(conv: nn.Conv2d, branches: int) -> None:
    """`branches` convolutions as one grouped convolution: [N, G*C, H, W], branch-major."""
    conv.in_channels *= branches
    conv.out_channels *= branches
    conv.groups *= branches


rule(*_CONVOLUTIONS)(widened_conv)
rule(*_TRANSPOSED)(widened)


@batch_rule(*_CONVOLUTIONS)
def run_conv(call: Call) -> OfRows:
    """Convolutions of several rows for each image, such as the heads of attention."""
    conv: Any = call.module
    if len(call.batch_facts().shape) != len(conv.kernel_size) + 2:
        raise Unpackable("its input has no batch dim")
    return of_rows(call)


class ConvFunction(nn.Module):
    """A convolution with weights that the base model reads or computes itself."""

    def __init__(self, target: Callable[..., Tensor]) -> None:
        super().__init__()
        self.target = target

    def forward(
        self,
        span: Span,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        """`[N, G*C, ...]`, `[G, O, I, ...]` and `[G, O]` -> `[N, G*O, ...]`."""
        bias = None if bias is None else bias.flatten(0, 1)
        groups *= span.size
        return self.target(input, weight.flatten(0, 1), bias, stride, padding, dilation, groups)


@rule(F.conv1d, F.conv2d, F.conv3d)
def pack_conv_function(call: Call) -> ConvFunction:
    """`F.conv2d` and its like with each branch's own weight and bias."""
    weight, _ = call.branch_tensors((1, "weight"), (2, "bias"))
    if weight is None or len(weight.shape) != len(call.input_facts().shape):
        raise Unpackable("its input has no batch dim")
    target: Any = call.node.target
    return ConvFunction(target)


class PackedCondConv(nn.Module):
    """timm's convolution whose weights every image mixes for itself from those of experts.

    It is a grouped convolution over the images already, so only the mixing has to know the branch.

    Args:
        module: the base architecture's convolution, for its options.
        storage: holds the packed `weight` `[G*E, P]` of `E` experts, and `bias` `[G*E, O]` or None.
        branches: how many branches the storage holds.
    """

    def __init__(self, module: CondConv2d, storage: nn.Module, branches: int) -> None:
        super().__init__()
        self.module, self.storage, self.branches = module, storage, branches

    def forward(self, span: Span, x: Tensor, routing_weights: Tensor) -> Tensor:
        """`[G*N, C, H, W]` and weights of the experts `[G*N, E]` -> `[G*N, O, H, W]`."""
        experts = {
            name: torch.unflatten(narrow(packed, self.branches, span), 0, (span.size, -1))
            for name in ("weight", "bias")
            if (packed := getattr(self.storage, name)) is not None
        }
        mixing = routing_weights.reshape(span.size, -1, routing_weights.shape[-1])
        mixed: Tensor = call_with(self.module, experts, (x, mixing))
        return mixed


@batch_rule(CondConv2d)
def run_cond_conv(call: Call) -> PackedCondConv:
    """Convolutions of images, each with its own weights of the experts."""
    images, mixing = (call.tensor(call.argument(*at)) for at in enumerate(("x", "routing_weights")))
    for known in (images, mixing):
        if known is None or known.batch_dim != 0:
            raise Unpackable("an argument does not begin with the batch")
    module: Any = call.module
    return PackedCondConv(module, call.packed_module, call.branches)
