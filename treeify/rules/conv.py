"""Convolutions: `G` of them are one grouped convolution (the paper's Figure 2)."""

import torch.nn.functional as F
from timm.layers.cond_conv2d import CondConv2d
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn

from treeify.rules.call import Call, Unpackable
from treeify.rules.operations.conv import ConvFunction, PackedCondConv, WidenedConv
from treeify.rules.operations.widened import OfRows
from treeify.rules.table import batch_rule, rule, widens
from treeify.rules.widening import of_rows, widened

# timm's padded and weight-standardised convolutions treat every output channel by itself, so they
# are grouped convolutions once their channels and groups are multiplied.
_CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(Conv2dSame, StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame),
)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@widens(*_CONVOLUTIONS, *_TRANSPOSED)
def pack_conv_module(conv: nn.Conv2d, branches: int) -> None:
    """`branches` convolutions as one grouped convolution: [N, G*C, H, W], branch-major."""
    # Branch-major, as a grouped convolution takes neighbouring channels for a group; and a span of
    # branches is then a view of the weights, not a copy.
    conv.in_channels *= branches
    conv.out_channels *= branches
    conv.groups *= branches


@rule(*_CONVOLUTIONS)
def pack_conv(call: Call) -> WidenedConv:
    """Convolutions; the first after a split reads its input once for all siblings."""
    operand = call.input_facts()
    _require_image(call, len(operand.shape))
    return WidenedConv(call.packed_module, call.module, call.branches, call.ratio, operand)


rule(*_TRANSPOSED)(widened)


@batch_rule(*_CONVOLUTIONS)
def run_conv(call: Call) -> OfRows:
    """Convolutions of several rows for each image, such as the heads of attention."""
    _require_image(call, len(call.batch_facts().shape))
    return of_rows(call)


def _require_image(call: Call, rank: int) -> None:
    """Refuse `[C, H, W]`, which torch takes for an image without a batch."""
    if rank != len(call.module.kernel_size) + 2:
        raise Unpackable("its input has no batch dim")


@rule(F.conv1d, F.conv2d, F.conv3d)
def pack_conv_function(call: Call) -> ConvFunction:
    """`F.conv2d` and its like with each branch's own weight and bias."""
    weight, _ = call.branch_tensors((1, "weight"), (2, "bias"))
    if weight is None or len(weight.shape) != len(call.input_facts().shape):
        raise Unpackable("its input has no batch dim")
    return ConvFunction(call.target)


@batch_rule(CondConv2d)
def run_cond_conv(call: Call) -> PackedCondConv:
    """Convolutions of images, each with its own weights of the experts."""
    for place in enumerate(("x", "routing_weights")):
        operand = call.tensor(call.argument(*place))
        if operand is None or operand.batch_dim != 0:
            raise Unpackable("an argument does not begin with the batch")
    return PackedCondConv(call.module, call.packed_module, call.branches)
