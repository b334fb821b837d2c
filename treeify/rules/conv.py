"""Convolutions: `G` of them are one grouped convolution (the paper's Figure 2)."""

from __future__ import annotations

from timm.layers.conv2d_same import Conv2dSame
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn

from treeify.rules.registry import rule, widens
from treeify.rules.widened import widened, widened_conv

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
